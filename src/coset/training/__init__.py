"""Training: settings, loss, optimizer, the loop, and runs that resume to the last bit."""
