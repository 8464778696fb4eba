"""Configuration files: strict TOML, checked by pydantic, turned into the library's dataclasses."""
