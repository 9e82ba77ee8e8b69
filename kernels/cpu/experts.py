"""A mixture of experts in one call of the compiled kernels (native/experts.c)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quartet.kernels.cpu import addresses, arguments
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native import structures
from quartet.kernels.cpu.native.library import ACTIVATIONS, Library, NormWeight


@dataclass(frozen=True, slots=True)
class Experts:
    """A router, experts and, where the family has one, an expert that every row passes."""

    before: NormWeight | None
    after: NormWeight | None
    router: Linear
    gate_up: Sequence[Linear]  # by expert
    down: Sequence[Linear]
    shared: tuple[Linear, Linear] | None  # gate and up, and down
    activation: str  # of native.ACTIVATIONS
    top_k: int
    renormalize: bool
    shared_gate: Linear | None = None  # of the shared expert's result
    router_norm: NormWeight | None = None  # then the router reads the residual stream by it
    router_scale: float = 1.0  # of its logits
    expert_scale: torch.Tensor | None = None  # (experts,) of the weights of the chosen ones
    after_chosen: NormWeight | None = None  # then the shared expert has norms around it, and no gate
    shared_before: NormWeight | None = None
    shared_after: NormWeight | None = None

    @property
    def linears(self) -> list[Linear]:
        """Its products."""
        gate = [] if self.shared_gate is None else [self.shared_gate]
        return [self.router, *self.gate_up, *self.down, *(self.shared or ()), *gate]

    @property
    def norms(self) -> list[NormWeight | None]:
        own = [self.router_norm, self.after_chosen, self.shared_before, self.shared_after]
        return [self.before, self.after, *own]

    @property
    def shares_known(self) -> bool:
        """Whether the shared expert is one with a gate, or one with norms beside chosen experts with one."""
        norms = [self.after_chosen, self.shared_before, self.shared_after]
        if self.shared is not None and self.shared_gate is None:
            return all(norm is not None for norm in norms)
        return (self.shared is None) == (self.shared_gate is None) and all(norm is None for norm in norms)

    def can_run(self) -> bool:
        """Whether the kernels know every operation."""
        gated = [*self.gate_up, *(self.shared or ())[:1]]
        return (
            self.shares_known
            and all(linear.has_kernel for linear in self.linears)
            and all(native.can_gate(len(linear.weight)) for linear in gated)
            and self.activation in ACTIVATIONS
        )

    def check(self) -> None:
        """Raise AssertionError unless all parts belong together. C code trusts them."""
        hidden, size = self.down[0].weight.shape
        assert 0 < self.top_k <= len(self.gate_up) == len(self.down), (self.top_k, len(self.gate_up), len(self.down))
        arguments.check_linear(self.router, len(self.gate_up), hidden)
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            arguments.check_linear(gate_up, 2 * size, hidden)
            arguments.check_linear(down, hidden, size)
        if self.shared is not None:
            gate_up, down = self.shared
            arguments.check_linear(gate_up, 2 * down.weight.shape[1], hidden)
            arguments.check_linear(down, hidden, down.weight.shape[1])
        if self.shared_gate is not None:
            arguments.check_linear(self.shared_gate, 1, hidden)
        scale = self.expert_scale
        assert scale is None or (scale.shape == (len(self.down),) and scale.dtype is torch.bfloat16), scale
        for norm in self.norms:
            arguments.check_norm(norm, hidden)


class ExpertsArgument:
    """Experts as the kernels take them, kept from call to call."""

    def __init__(self, experts: Experts) -> None:
        assert experts.can_run(), experts
        experts.check()
        self.experts = experts
        self.hidden = len(experts.down[0].weight)
        self.gate_up = (structures.Product * len(experts.gate_up))()
        self.down = (structures.Product * len(experts.down))()
        self.structure = structures.Experts()
        self.filled = -1  # addresses.moves() then

    def fill(self) -> structures.Experts:
        """The structure with the addresses that the weights have now."""
        experts, moves = self.experts, addresses.moves()
        if moves == self.filled:
            return self.structure
        for place, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
            self.gate_up[place] = arguments.product(gate_up, "gated", activation=experts.activation)
            self.down[place] = arguments.product(down, "bf16")
        self.structure = structures.Experts(
            before=arguments.norm_argument(experts.before),
            after=arguments.norm_argument(experts.after),
            count=len(experts.gate_up),
            top_k=experts.top_k,
            hidden=self.hidden,
            size=experts.down[0].weight.shape[1],
            renormalize=experts.renormalize,
            router=arguments.product(experts.router, "float"),
            gate_up=self.gate_up,
            down=self.down,
            has_shared=experts.shared is not None,
            router_norm=arguments.norm_argument(experts.router_norm),
            router_scale=experts.router_scale,
            expert_scale=None if experts.expert_scale is None else experts.expert_scale.data_ptr(),
            after_chosen=arguments.norm_argument(experts.after_chosen),
            shared_before=arguments.norm_argument(experts.shared_before),
            shared_after=arguments.norm_argument(experts.shared_after),
        )
        if experts.shared is not None:
            gate_up, down = experts.shared
            self.structure.shared_size = down.weight.shape[1]
            self.structure.shared_gate_up = arguments.product(gate_up, "gated", activation=experts.activation)
            self.structure.shared_down = arguments.product(down, "bf16")
        if experts.shared_gate is not None:
            self.structure.shared_gate = arguments.product(experts.shared_gate, "float")
        self.filled = moves
        return self.structure

    def add(self, kernels: Library, residual: torch.Tensor) -> torch.Tensor:
        """residual (rows, hidden) += the mixture of its rows; the chosen experts (rows, top_k) int64, best first."""
        native.check_matrix(residual)
        rows = len(residual)
        assert residual.is_contiguous() and residual.shape[1] == self.hidden, residual.shape
        ids = torch.empty(rows, self.experts.top_k, dtype=torch.int64)
        run = kernels.functions.quartet_experts
        pointer = ctypes.c_void_p
        structure, threads = ctypes.POINTER(structures.Experts), torch.get_num_threads()
        additions = ctypes.POINTER(structures.Additions)
        run.argtypes = (pointer, structure, ctypes.c_int64, pointer, pointer, ctypes.c_float, ctypes.c_int32, additions)
        added = native.pointer_to(self.experts.router.additions, rows)
        memory = residual.data_ptr(), ids.data_ptr()
        if rows and run(kernels.kernels, self.fill(), rows, *memory, 0.0, threads, added):
            raise MemoryError(f"no memory for the experts of {rows} tokens")
        return ids
