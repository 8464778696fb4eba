"""PET, the point-edge transformer: an unconstrained network over edge vectors.

Every kept edge carries a token, every atom a center token. A layer mixes the tokens of each atom
by attention; between layers the two edges of a pair exchange their tokens. Atomic energies are read
from nodes and edges, weighted by the cutoff factors.

Source: arXiv 2601.16195 (architecture, appendix); names of weights as in published checkpoints.
Legend: R rotations, A atoms, E kept edges, D width.
"""

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from coset.edge_model import Exchange, Geometry, Outputs, Readout
from coset.errors import ConfigError
from coset.neighbors import Edges
from coset.pet.attention import LayerNorm, TransformerLayer, token_classes
from coset.pet.cutoff import CUTOFF_FUNCTIONS, adaptive_radii
from coset.pet.hypers import MAX_ATOMIC_NUMBER, ConditioningHypers, PetHypers
from coset.repulsion import within_zbl_reach, zbl_energies

CANDIDATE_MARGIN = 1e-6
BIAS_FLOOR = {"metatrain": 1e-15, "coset": 1e-38}


class SystemConditioning(nn.Module):
    """A vector for the total charge and spin multiplicity of a system, added to its nodes."""

    def __init__(self, hypers: ConditioningHypers, width: int) -> None:
        """Two embeddings, projected together."""
        super().__init__()
        self.max_charge = hypers.max_charge
        self.charge_embedding = nn.Embedding(2 * hypers.max_charge + 1, width)
        self.spin_multiplicity_embedding = nn.Embedding(hypers.max_spin_multiplicity, width)
        self.project = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(
        self, charge: Int[Tensor, " systems"], spin_multiplicity: Int[Tensor, " systems"]
    ) -> Float[Tensor, "systems width"]:
        """One vector per system."""
        charges = self.charge_embedding(charge + self.max_charge)
        spins = self.spin_multiplicity_embedding(spin_multiplicity - 1)
        projected: Tensor = self.project(torch.cat([charges, spins], dim=-1))
        return projected


class GnnLayer(nn.Module):
    """Embeds edge vectors, messages (and neighbor species) to tokens, then runs a transformer."""

    def __init__(self, hypers: PetHypers, index: int) -> None:
        """The first layer has no neighbor embedding: its messages are the neighbor species."""
        super().__init__()
        network, d = hypers.network, hypers.network.d_pet
        self.trans = nn.Module()
        self.trans.layers = nn.ModuleList(
            TransformerLayer(network, hypers.norm_eps) for _ in range(network.n_attention_layers)
        )
        self.edge_embedder = nn.Linear(4, d)
        self.compress = nn.Sequential(
            nn.Linear((2 if index == 0 else 3) * d, d), nn.SiLU(), nn.Linear(d, d)
        )
        self.neighbor_embedder = nn.Embedding(len(hypers.atomic_types), d) if index > 0 else None

    def forward(
        self,
        node: Float[Tensor, "rotations atoms d_node"],
        message: Float[Tensor, "rotations kept d_pet"],
        shared: "Shared",
        *,
        create_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        """Node features and edge tokens after this layer."""
        edge = self._tokens(message, shared)
        for layer in self.trans.layers:  # type: ignore[union-attr]
            node, edge = layer(node, edge, shared.bias, shared.geometry, create_graph=create_graph)
        return node, edge

    def _tokens(
        self, message: Float[Tensor, "rotations kept d_pet"], shared: "Shared"
    ) -> Float[Tensor, "rotations kept d_pet"]:
        """compress(cat[edge_embedder(r, |r|), neighbor_embedder(species), message]).

        The first linear map of `compress` is applied to each part by itself, joined with the
        embedding before it: [d, 4] for the vectors, a table over species for the neighbors.
        """
        first, d = cast(nn.Linear, self.compress[0]), message.shape[-1]
        of_vector, of_message = first.weight[:, :d], first.weight[:, -d:]
        bias = functional.linear(self.edge_embedder.bias, of_vector, first.bias)
        hidden = functional.linear(shared.vectors, of_vector @ self.edge_embedder.weight, bias)
        hidden = hidden + functional.linear(message, of_message)
        if self.neighbor_embedder is not None:
            of_neighbor = first.weight[:, d : 2 * d]
            table = functional.linear(self.neighbor_embedder.weight, of_neighbor)
            hidden = hidden + table[shared.neighbor_species]
        tokens: Tensor = self.compress[2](functional.silu(hidden))
        return tokens


class Shared:
    """What all layers of one call use: geometry in the dtype of the network."""

    def __init__(
        self,
        vectors: Float[Tensor, "rotations kept 3"],
        geometry: Geometry,
        species: Int[Tensor, " atoms"],
        floor: float,
        dtype: torch.dtype,
    ) -> None:
        """Cast the vectors (with their length), the bias log f and the weights f."""
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        self.vectors = torch.cat([vectors, length], dim=-1).to(dtype)
        logs = torch.log(geometry.weights.clamp_min(floor))
        self.bias = torch.cat([logs.new_zeros(len(species)), logs]).to(dtype)
        self.weights = geometry.weights.to(dtype)
        self.geometry = geometry
        self.species = species
        self.neighbor_species = species[geometry.graph.neighbors]


class Pet(nn.Module):
    """The network with its scales: an `EdgeModel` whose energies leave in eV."""

    species_of: Tensor
    node_heads: nn.ModuleDict
    edge_heads: nn.ModuleDict
    node_last_layers: nn.ModuleDict
    edge_last_layers: nn.ModuleDict

    def __init__(
        self, hypers: PetHypers, scales: Mapping[str, float | tuple[float, ...]] | None = None
    ) -> None:
        """Randomly initialized; scales: one factor per target, or one per species index."""
        super().__init__()
        network = hypers.network
        d, d_node, n_species = network.d_pet, network.d_node, len(hypers.atomic_types)
        self.hypers = hypers
        self.feedforward = network.featurizer == "feedforward"
        self.n_readouts = 1 if self.feedforward else network.n_gnn_layers
        self.gnn_layers = nn.ModuleList(
            GnnLayer(hypers, index) for index in range(network.n_gnn_layers)
        )
        if self.feedforward:
            self.combination_norms = nn.ModuleList(
                LayerNorm(2 * d) for _ in range(network.n_gnn_layers)
            )
            self.combination_mlps = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
                for _ in range(network.n_gnn_layers)
            )
        self.node_embedders = nn.ModuleList(
            nn.Embedding(n_species, d_node) for _ in range(self.n_readouts)
        )
        self.edge_embedder = nn.Embedding(n_species, d)
        for kind, width in (("node", d_node), ("edge", d)):
            self._add_heads(kind, width)
        if hypers.conditioning is not None:
            self.system_conditioning = SystemConditioning(hypers.conditioning, d_node)
        self._add_species_and_scales(scales or {})

    def _add_heads(self, kind: str, width: int) -> None:
        d_head = self.hypers.network.d_head
        heads, last = nn.ModuleDict(), nn.ModuleDict()
        for target in self.hypers.targets:
            heads[target.name] = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(width, d_head), nn.SiLU(), nn.Linear(d_head, d_head), nn.SiLU()
                )
                for _ in range(self.n_readouts)
            )
            last[target.name] = nn.ModuleList(
                nn.Linear(d_head, target.width) for _ in range(self.n_readouts)
            )
        setattr(self, f"{kind}_heads", heads)
        setattr(self, f"{kind}_last_layers", last)

    def _add_species_and_scales(self, scales: Mapping[str, float | tuple[float, ...]]) -> None:
        types = self.hypers.atomic_types
        species_of = torch.full((MAX_ATOMIC_NUMBER + 1,), -1, dtype=torch.int64)
        species_of[list(types)] = torch.arange(len(types))
        self.register_buffer("species_of", species_of, persistent=False)
        self.scales = {
            target.name: torch.tensor(scales.get(target.name, 1.0), dtype=torch.float64).expand(
                len(types)
            )
            for target in self.hypers.targets
        }

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.edge_embedder.weight.dtype

    def geometry(
        self, edge_vectors: Float[Tensor, "edges 3"], graph: Edges, exchange: Exchange
    ) -> Geometry:
        """Kept edges, their cutoff factors and attention classes."""
        cutoff = self.hypers.cutoff
        vectors = edge_vectors.double()
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        n_atoms = len(graph.atomic_numbers)
        if cutoff.adaptive == "fixed":
            pair_cutoffs = torch.full_like(distances, cutoff.cutoff)
        else:
            radii = adaptive_radii(distances, graph.centers, n_atoms, cutoff)
            pair_cutoffs = 0.5 * (radii[graph.centers] + exchange.to_neighbors(radii, graph))
        kept = torch.nonzero((distances <= pair_cutoffs).detach())[:, 0]
        function = CUTOFF_FUNCTIONS[cutoff.function]
        kept_graph = graph.subset(kept)
        tokens, counts, place = token_classes(kept_graph.centers, n_atoms)
        return Geometry(
            kept=kept,
            graph=kept_graph,
            weights=function(distances[kept], pair_cutoffs[kept], cutoff.width),
            tokens=tokens,
            counts=counts,
            place=place,
            energies=self._repulsion(distances, graph),
        )

    def candidates(
        self, edge_vectors: Float[Tensor, "edges 3"], graph: Edges
    ) -> Int[Tensor, " needed"]:
        """Rows of the edges that can matter: without the others nothing changes.

        Those are longer than the adaptive radii of both ends, and beyond the repulsion. A `grid`
        cutoff needs every edge.
        """
        cutoff = self.hypers.cutoff
        distances = torch.linalg.vector_norm(edge_vectors.detach().double(), dim=-1)
        if cutoff.adaptive in ("fixed", "grid"):
            return torch.arange(len(distances), device=distances.device)
        radii = adaptive_radii(distances, graph.centers, len(graph.atomic_numbers), cutoff)
        longest = torch.maximum(radii[graph.centers], radii[graph.neighbors])
        needed = distances <= longest + CANDIDATE_MARGIN
        if self.hypers.zbl:
            needed |= within_zbl_reach(distances, graph, self.hypers.zbl)
        return torch.nonzero(needed)[:, 0]

    def network(
        self,
        edge_vectors: Float[Tensor, "rotations kept 3"],
        geometry: Geometry,
        exchange: Exchange,
        outputs: Outputs,
        *,
        create_graph: bool,
    ) -> Readout:
        """Atomic energies (eV, without baseline) and the direct heads asked for."""
        graph = geometry.graph
        species = self._species(graph)
        floor = BIAS_FLOOR[self.hypers.numerics]
        shared = Shared(edge_vectors, geometry, species, floor, self.dtype)
        features = self._features(shared, exchange, create_graph=create_graph)
        energies = torch.stack(
            [self._head(name, features, shared)[..., 0] for name in outputs.energy]
        )
        chosen = graph.target_index[graph.system_index]
        atoms = torch.arange(len(chosen), device=chosen.device)
        forces = stress = None
        if outputs.direct_forces is not None:
            forces = self._head(outputs.direct_forces, features, shared)
        if outputs.direct_stress is not None:
            flat = self._head(outputs.direct_stress, features, shared)
            per_atom = flat.reshape(*flat.shape[:2], 3, 3)
            empty = per_atom.new_zeros(len(per_atom), len(graph.charge), 3, 3)
            stress = empty.index_add(1, graph.system_index, per_atom)
        return Readout(
            atomic_energies=energies[chosen, :, atoms].mT,
            direct_forces=forces,
            direct_stress=stress,
        )

    def memory_per_batch(self, n_atoms: int, n_edges: int) -> float:
        """Bytes of a float32 gradient, from the widths kept for the backward pass (estimate).

        At most 2.2 N of the candidate edges survive an adaptive cutoff; about 60 arrays of width
        d_pet are kept per edge and transformer layer, and 24 of d_node per atom.
        """
        network, cutoff = self.hypers.network, self.hypers.cutoff
        layers = network.n_gnn_layers * network.n_attention_layers
        size = torch.finfo(self.dtype).bits // 8
        kept = float(n_edges)
        if cutoff.n_neighbors is not None and n_atoms:
            kept = min(kept, 2.2 * cutoff.n_neighbors * n_atoms)
        per_edge = 60 * layers * network.d_pet * size
        return kept * per_edge + n_atoms * 24 * layers * network.d_node * size + 400.0 * n_edges

    def _repulsion(self, distances: Tensor, graph: Edges) -> Tensor | None:
        if not self.hypers.zbl:
            return None
        single = self.hypers.numerics == "metatrain"
        return zbl_energies(distances, graph, self.hypers.zbl, single_constants=single)

    def _species(self, graph: Edges) -> Int[Tensor, " atoms"]:
        species = self.species_of[graph.atomic_numbers]
        if len(species) and int(species.min()) < 0:
            number = int(graph.atomic_numbers[int(species.argmin())])
            raise ConfigError(
                f"element Z = {number} is unknown to this network", code="UnknownElement"
            )
        return species

    def _features(
        self, shared: Shared, exchange: Exchange, *, create_graph: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Node features [R, A, D] and messages [R, E, d] of every readout."""
        n_rotations = len(shared.vectors)
        graph = shared.geometry.graph
        message = self.edge_embedder(shared.neighbor_species).expand(n_rotations, -1, -1)
        node = self.node_embedders[0](shared.species).expand(n_rotations, -1, -1)
        condition = self._condition(graph)
        readouts = []
        for index, layer in enumerate(self.gnn_layers):
            if not self.feedforward:
                node = self.node_embedders[index](shared.species).expand(n_rotations, -1, -1)
            node, out = layer(node, message, shared, create_graph=create_graph)
            if condition is not None:
                node = node + condition
            reverse = exchange.reverse(out, graph)
            if self.feedforward:
                joined = self.combination_norms[index](torch.cat([out, reverse], dim=-1))
                message = message + out + self.combination_mlps[index](joined)
            else:
                readouts.append((node, out))
                message = 0.5 * (message + reverse)
        return [(node, message)] if self.feedforward else readouts

    def _condition(self, graph: Edges) -> Tensor | None:
        if self.hypers.conditioning is None:
            return None
        condition = self.system_conditioning(graph.charge, graph.spin_multiplicity)
        per_atom: Tensor = condition[graph.system_index]
        return per_atom

    def _head(
        self, name: str, features: list[tuple[Tensor, Tensor]], shared: Shared
    ) -> Float[Tensor, "rotations atoms width"]:
        """Scaled sum of node and weighted edge readouts in float64."""
        centers = shared.geometry.graph.centers
        total: Tensor | None = None
        for index, (node, message) in enumerate(features):
            on_node = _apply(self.node_heads, self.node_last_layers, name, index, node)
            on_edge = _apply(self.edge_heads, self.edge_last_layers, name, index, message)
            weighted = on_edge.double() * shared.weights.double()[:, None]
            summed = on_node.double().index_add(1, centers, weighted)
            total = summed if total is None else total + summed
        assert total is not None
        scale = self.scales[name].to(total.device)[shared.species]
        return total * scale[:, None]


def _apply(
    heads: nn.ModuleDict, last: nn.ModuleDict, name: str, index: int, features: Tensor
) -> Tensor:
    """The head of one target and readout."""
    head, linear = cast(nn.ModuleList, heads[name]), cast(nn.ModuleList, last[name])
    values: Tensor = linear[index](head[index](features))
    return values
