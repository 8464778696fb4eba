"""What makes one PET network different from another, as frozen dataclasses.

Names follow the paper (arXiv 2601.16195, Table IV): d_pet is the width of an edge token, d_node
that of the node features. Ranges are checked here: stored manifests and Python callers pass here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from coset.errors import ConfigError, check_choice, check_range

Quantity = Literal["energy", "direct_forces", "direct_stress"]
WIDTHS: dict[str, int] = {"energy": 1, "direct_forces": 3, "direct_stress": 9}
MAX_ATOMIC_NUMBER = 118
MAX_WIDTH = 16_384
MAX_PARAMETERS = 20_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkHypers:
    """Widths, depths and block types of the transformer."""

    d_pet: int = 128
    d_node: int = 512
    d_head: int = 128
    d_feedforward: int = 256
    n_heads: int = 8
    n_gnn_layers: int = 2
    n_attention_layers: int = 1
    normalization: Literal["rms", "layer"] = "rms"
    activation: Literal["glu", "silu"] = "glu"
    norm_placement: Literal["pre", "post"] = "pre"
    featurizer: Literal["feedforward", "residual"] = "feedforward"
    attention_temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse widths and depths that no network can have."""
        for name in ("d_pet", "d_node", "d_head", "d_feedforward", "n_heads"):
            check_range(name, getattr(self, name), 1, MAX_WIDTH)
        check_range("n_gnn_layers", self.n_gnn_layers, 1, 64)
        check_range("n_attention_layers", self.n_attention_layers, 1, 64)
        check_range("attention_temperature", self.attention_temperature, 1e-6, 1e6)
        check_choice("normalization", self.normalization, ("rms", "layer"))
        check_choice("activation", self.activation, ("glu", "silu"))
        check_choice("norm_placement", self.norm_placement, ("pre", "post"))
        check_choice("featurizer", self.featurizer, ("feedforward", "residual"))
        if self.d_pet % self.n_heads:
            raise ConfigError(
                f"d_pet = {self.d_pet} is not a multiple of n_heads = {self.n_heads}",
                field="network.n_heads",
            )

    @property
    def expanded(self) -> bool:
        """Whether node features are wider than edge tokens (contraction, expansion, node MLP)."""
        return self.d_node != self.d_pet


@dataclass(frozen=True, kw_only=True, slots=True)
class CutoffHypers:
    """Radius, smoothing and the adaptive choice of the neighborhood (lengths in Å).

    `adaptive` names how the per-atom radius that holds about `n_neighbors` is found: `fixed` (no
    adaptation), `converged` (ours: exact root, exact derivatives), `solver10` and `grid` (those of
    imported checkpoints).
    """

    cutoff: float = 7.5
    width: float = 0.5
    function: Literal["bump", "cosine"] = "bump"
    adaptive: Literal["fixed", "converged", "solver10", "grid"] = "converged"
    n_neighbors: float | None = 8.0
    adaptive_width: float = 1.0

    def __post_init__(self) -> None:
        """Refuse radii that cannot be searched and incomplete adaptive settings."""
        check_range("cutoff", self.cutoff, 0.5, 50.0)
        check_range("width", self.width, 1e-3, self.cutoff)
        check_range("adaptive_width", self.adaptive_width, 1e-3, self.cutoff)
        check_choice("function", self.function, ("bump", "cosine"))
        check_choice("adaptive", self.adaptive, ("fixed", "converged", "solver10", "grid"))
        if (self.adaptive == "fixed") != (self.n_neighbors is None):
            raise ConfigError(
                f"cutoff.adaptive = {self.adaptive!r} with n_neighbors = {self.n_neighbors}: "
                "'fixed' has no number of neighbors, every other method needs one",
                field="cutoff.n_neighbors",
            )
        if self.n_neighbors is not None:
            check_range("n_neighbors", self.n_neighbors, 1e-3, 10_000.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningHypers:
    """Ranges of total charge and spin multiplicity that the network was given."""

    max_charge: int = 10
    max_spin_multiplicity: int = 10

    def __post_init__(self) -> None:
        """Refuse empty or absurd ranges."""
        check_range("max_charge", self.max_charge, 0, 1000)
        check_range("max_spin_multiplicity", self.max_spin_multiplicity, 1, 1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One readout head: its name (`energy`, `energy/pbe`, ...) and what it predicts."""

    name: str
    quantity: Quantity

    def __post_init__(self) -> None:
        """Refuse unknown quantities."""
        check_choice("quantity", self.quantity, tuple(WIDTHS))

    @property
    def width(self) -> int:
        """Number of components per atom."""
        return WIDTHS[self.quantity]


@dataclass(frozen=True, kw_only=True, slots=True)
class PetHypers:
    """Everything that fixes a PET network but its weights.

    `zbl` is the reach of the pair repulsion in units of the sum of the covalent radii (0: none).
    `numerics` is `metatrain` for imported checkpoints (bias floor 1e-15, machine-dependent epsilon
    of RMSNorm) and `coset` for our own (floor only against zero, one explicit epsilon `norm_eps`).
    """

    atomic_types: tuple[int, ...]
    targets: tuple[Target, ...]
    network: NetworkHypers = field(default_factory=NetworkHypers)
    cutoff: CutoffHypers = field(default_factory=CutoffHypers)
    conditioning: ConditioningHypers | None = None
    zbl: float = 0.0
    numerics: Literal["metatrain", "coset"] = "coset"
    norm_eps: float | None = 1e-6

    def __post_init__(self) -> None:
        """Refuse unknown elements, doubled names and settings that give silently odd networks."""
        check_choice("numerics", self.numerics, ("metatrain", "coset"))
        check_range("zbl", self.zbl, 0.0, 2.0)
        types = self.atomic_types
        if not types or len(set(types)) != len(types):
            raise ConfigError(f"atomic_types must be distinct and not empty, not {types}")
        for number in types:
            check_range("atomic_types", number, 1, MAX_ATOMIC_NUMBER)
        names = [target.name for target in self.targets]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"targets must have distinct names, not {names}", field="targets")
        if (self.norm_eps is None) != (self.numerics == "metatrain"):
            raise ConfigError(
                f"norm_eps = {self.norm_eps} with numerics = {self.numerics!r}: 'coset' states its "
                "epsilon, 'metatrain' takes the machine epsilon of the dtype",
                field="norm_eps",
            )
        network = self.network
        if self.numerics == "coset" and network.norm_placement == "pre" and not network.expanded:
            raise ConfigError(
                f"d_node = d_pet = {network.d_pet} with norm_placement 'pre' leaves the center "
                "without a residual; choose d_node > d_pet",
                field="network.d_node",
            )
        if (count := self.n_parameters()) > MAX_PARAMETERS:
            raise ConfigError(f"{count:.3g} parameters exceed the limit of {MAX_PARAMETERS:.3g}")

    def targets_of(self, quantity: Quantity) -> tuple[str, ...]:
        """Names of the targets that predict `quantity`."""
        return tuple(target.name for target in self.targets if target.quantity == quantity)

    def n_parameters(self) -> int:
        """Number of weights, without building the network (exact)."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order of the network."""
        return dict(_parameter_shapes(self))


Shapes = Iterable[tuple[str, tuple[int, ...]]]


def _linear(name: str, n_in: int, n_out: int) -> Shapes:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)


def _norm(name: str, width: int, *, bias: bool) -> Shapes:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _feed_forward(name: str, width: int, hidden: int, *, glu: bool) -> Shapes:
    yield from _linear(f"{name}.w_in", width, 2 * hidden if glu else hidden)
    yield from _linear(f"{name}.w_out", hidden, width)


def _attention_layer(name: str, net: NetworkHypers) -> Shapes:
    d, bias, glu = net.d_pet, net.normalization == "layer", net.activation == "glu"
    yield from _linear(f"{name}.attention.input_linear", d, 3 * d)
    yield from _linear(f"{name}.attention.output_linear", d, d)
    yield from _norm(f"{name}.norm_attention", d, bias=bias)
    yield from _norm(f"{name}.norm_mlp", d, bias=bias)
    yield from _feed_forward(f"{name}.mlp", d, net.d_feedforward, glu=glu)
    if net.expanded:
        yield from _linear(f"{name}.center_contraction", net.d_node, d)
        yield from _linear(f"{name}.center_expansion", d, net.d_node)
        yield from _norm(f"{name}.norm_center_features", net.d_node, bias=bias)
        yield from _feed_forward(f"{name}.center_mlp", net.d_node, 2 * net.d_node, glu=glu)


def _heads(target: Target, net: NetworkHypers, n_readouts: int) -> Shapes:
    for layer in range(n_readouts):
        for kind, width in (("node", net.d_node), ("edge", net.d_pet)):
            head = f"{kind}_heads.{target.name}.{layer}"
            yield from _linear(f"{head}.0", width, net.d_head)
            yield from _linear(f"{head}.2", net.d_head, net.d_head)
            last = f"{kind}_last_layers.{target.name}.{layer}"
            yield from _linear(last, net.d_head, target.width)


def _parameter_shapes(hypers: PetHypers) -> Shapes:
    net, d, n_species = hypers.network, hypers.network.d_pet, len(hypers.atomic_types)
    for g in range(net.n_gnn_layers):
        layer = f"gnn_layers.{g}"
        for a in range(net.n_attention_layers):
            yield from _attention_layer(f"{layer}.trans.layers.{a}", net)
        yield from _linear(f"{layer}.edge_embedder", 4, d)
        yield from _linear(f"{layer}.compress.0", (2 if g == 0 else 3) * d, d)
        yield from _linear(f"{layer}.compress.2", d, d)
        if g > 0:
            yield f"{layer}.neighbor_embedder.weight", (n_species, d)
    feedforward = net.featurizer == "feedforward"
    if feedforward:
        for g in range(net.n_gnn_layers):
            yield from _norm(f"combination_norms.{g}", 2 * d, bias=True)
            yield from _linear(f"combination_mlps.{g}.0", 2 * d, 2 * d)
            yield from _linear(f"combination_mlps.{g}.2", 2 * d, d)
    n_readouts = 1 if feedforward else net.n_gnn_layers
    for layer_index in range(n_readouts):
        yield f"node_embedders.{layer_index}.weight", (n_species, net.d_node)
    yield "edge_embedder.weight", (n_species, d)
    for target in hypers.targets:
        yield from _heads(target, net, n_readouts)
    if hypers.conditioning is not None:
        name, width = "system_conditioning", net.d_node
        charges = 2 * hypers.conditioning.max_charge + 1
        yield f"{name}.charge_embedding.weight", (charges, width)
        spins = hypers.conditioning.max_spin_multiplicity
        yield f"{name}.spin_multiplicity_embedding.weight", (spins, width)
        yield from _linear(f"{name}.project.0", 2 * width, width)
        yield from _linear(f"{name}.project.2", width, width)
