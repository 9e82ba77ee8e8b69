"""The compiled kernels as Python functions on CPU tensors. Shapes are checked here: C code trusts what it is given.

    native.library()     the library on the best instruction set of this machine, or None

QUARTET_CPU_ISA, and oneDNN's own ONEDNN_MAX_CPU_ISA, name the highest instruction set to use; "none" leaves the library
out.
"""

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache

import torch

from quartet.kernels.cpu.native import build
from quartet.kernels.cpu.native.page_table import PageTable
from quartet.kernels.cpu.native.pages import in_huge_pages
from quartet.kernels.cpu.native.structures import Additions, Attention, Norm, Product, Quantized, Rotation, Rows

log = logging.getLogger(__name__)

INSTRUCTION_SETS = tuple(build.FEATURES)  # ascending
ONEDNN_NAMES = {
    "SSE41": "none",
    "AVX": "none",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_bf16",
}
BLOCK_COLUMNS, BLOCK_DEPTH = 16, 32  # to multiples of which a packed weight is padded
ROWS_OF_TILES = 32  # to multiples of which rows are padded that pass from one product to the next
MOST_DIM = 512  # of an attention head
PACKED_AT_ONCE = 4 << 20  # bytes
NOT_QUANTIZED = Quantized()  # no numbers: the weight is packed bfloat16
OUTPUTS = {"bf16": 0, "float": 1, "add": 2, "gated": 3}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


NormWeight = tuple[torch.Tensor, float, float]  # weight (k,), epsilon, what is added to the weight


class Library:
    """The kernels on one instruction set. Raises LookupError where the machine does not have it."""

    def __init__(self, functions: ctypes.CDLL, instruction_set: str) -> None:
        functions.quartet_kernels.restype = ctypes.c_void_p
        self.kernels = functions.quartet_kernels(instruction_set.encode())
        if not self.kernels:
            raise LookupError(instruction_set)
        self.functions = functions
        self.instruction_set = instruction_set
        functions.quartet_has_attention.argtypes = (ctypes.c_void_p,)
        self.has_attention = bool(functions.quartet_has_attention(self.kernels))
        functions.quartet_pack.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
        )
        functions.quartet_pack.restype = None
        functions.quartet_product.argtypes = (ctypes.c_void_p, ctypes.POINTER(Product))
        functions.quartet_add_normed.argtypes = (ctypes.c_void_p, ctypes.POINTER(Rows))
        functions.quartet_add_normed.restype = None
        functions.quartet_rotate.argtypes = (ctypes.c_void_p, ctypes.POINTER(Rotation))
        functions.quartet_rotate.restype = None
        functions.quartet_attention.argtypes = (ctypes.c_void_p, ctypes.POINTER(Attention))

    def pack(self, weight: torch.Tensor, yield_point: Callable[[], None]) -> torch.Tensor:
        """weight (n, k) bfloat16 → (n / 16, k / 2, 16, 2), padded. Calls `yield_point` after each few megabytes."""
        check_matrix(weight)
        n, k = weight.shape
        depth = padded(k, BLOCK_DEPTH)
        blocks = padded(n, BLOCK_COLUMNS) // BLOCK_COLUMNS
        out = in_huge_pages(weight.new_empty(blocks, depth // 2, BLOCK_COLUMNS, 2))
        step = max(1, PACKED_AT_ONCE // (2 * depth * BLOCK_COLUMNS)) * BLOCK_COLUMNS
        for first in range(0, n, step):
            part, to = weight[first : first + step], out[first // BLOCK_COLUMNS]
            self.functions.quartet_pack(
                part.data_ptr(), len(part), k, part.stride(0), to.data_ptr(), torch.get_num_threads()
            )
            yield_point()
        return out

    def product(
        self,
        x: torch.Tensor,
        packed: "torch.Tensor | Quantized",
        n: int,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        output: str,
        activation: str = "silu",
        norm: NormWeight | None = None,
        additions: Additions | None = None,
        number: int = 0,
    ) -> None:
        """out = norm(x) (rows, k) @ weight.T + bias by one of OUTPUTS: written, added, or gated to (rows, n / 2).

        The weight: what `pack` gave, or the argument that a QuantizedWeight of shape (n, k) gives. `additions`: what
        adapters of these rows add to the product, which they know by `number`.
        """
        check_matrix(x)
        rows, k = x.shape
        is_packed = isinstance(packed, torch.Tensor)
        shape = (-(-n // BLOCK_COLUMNS), padded(k, BLOCK_DEPTH) // 2, BLOCK_COLUMNS, 2)
        assert not is_packed or packed.shape == shape, (packed.shape, n, k)
        assert bias is None or (bias.shape == (n,) and bias.is_contiguous() and bias.dtype is torch.bfloat16)
        assert output != "gated" or can_gate(n), n
        assert out.shape == (rows, n // 2 if output == "gated" else n), (out.shape, rows, n)
        assert out.stride(1) == 1 or out.shape[1] == 1, out.stride()
        assert out.dtype is (torch.float32 if output == "float" else torch.bfloat16), out.dtype
        weight, epsilon, offset = norm or (None, 0.0, 0.0)
        assert weight is None or (weight.shape == (k,) and weight.dtype is torch.bfloat16 and weight.is_contiguous())
        wanted = Product(
            x.data_ptr(),
            rows,
            x.stride(0),
            None if weight is None else weight.data_ptr(),
            epsilon,
            offset,
            packed.data_ptr() if is_packed else None,
            NOT_QUANTIZED if is_packed else packed,
            n,
            k,
            None if bias is None else bias.data_ptr(),
            OUTPUTS[output],
            ACTIVATIONS[activation],
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
            number,
            pointer_to(additions, rows),
        )
        if self.functions.quartet_product(self.kernels, wanted):
            raise MemoryError(f"no memory for a product of {rows} rows of {k}")

    def add_normed(self, x: torch.Tensor, norm: NormWeight, residual: torch.Tensor) -> None:
        """residual (rows, width) += norm(x), rounded to bfloat16 before it is added."""
        weight, epsilon, offset = norm
        rows, width = x.shape
        assert weight.shape == (width,) and weight.dtype is torch.bfloat16 and residual.shape == x.shape, x.shape
        for tensor in (x, residual, weight):
            assert tensor.dtype is torch.bfloat16 and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
        own = Norm(weight.data_ptr(), epsilon, offset)
        wanted = Rows(x.data_ptr(), None, residual.data_ptr(), rows, width, own, 0.0, torch.get_num_threads())
        self.functions.quartet_add_normed(self.kernels, wanted)

    def rotate(
        self,
        qkv: torch.Tensor,
        query_norm: NormWeight | None,
        key_norm: NormWeight | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        q: torch.Tensor,
        value_norm: NormWeight | None = None,
        values_from_keys: bool = False,
    ) -> None:
        """qkv (tokens, (heads + 2 * kv_heads) * dim), normed by head, rotated → q (tokens, heads, dim) and the pools.

        cos and sin (tokens, 1, rotary_dim) as kernels.reference.layers.rotation makes them; keys and values go to the
        places `slots` (tokens,) int64 of the pools (kv_heads, pool tokens, dim), which must have them. With
        `values_from_keys` there are no columns of values: they are made of keys before their norm.
        """
        check_matrix(qkv)
        tokens, heads, dim = q.shape
        kv_heads, rotary = keys.shape[0], cos.shape[-1]
        parts = heads + (1 if values_from_keys else 2) * kv_heads
        assert qkv.shape == (tokens, parts * dim), (qkv.shape, q.shape, keys.shape)
        assert self.can_rotate(dim, rotary), (dim, rotary)
        assert cos.shape == sin.shape == (tokens, 1, rotary), (cos.shape, sin.shape, tokens)
        assert keys.shape == values.shape and keys.shape[2] == dim, (keys.shape, values.shape, dim)
        assert slots.shape == (tokens,) and slots.dtype is torch.int64, (slots.shape, slots.dtype)
        for tensor in (cos, sin, keys, values, q):
            assert tensor.dtype is torch.bfloat16 and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
        norms = query_norm, key_norm, value_norm
        for norm in norms:
            assert norm is None or (norm[0].shape == (dim,) and norm[0].dtype is torch.bfloat16), norm
        _, epsilon, offset = query_norm or key_norm or (None, 0.0, 0.0)
        assert value_norm is None or value_norm[1:] == (epsilon, offset), (value_norm, epsilon, offset)
        self.functions.quartet_rotate(
            self.kernels,
            Rotation(
                qkv.data_ptr(),
                tokens,
                qkv.stride(0),
                heads,
                kv_heads,
                dim,
                rotary,
                *(None if norm is None else norm[0].data_ptr() for norm in norms),
                epsilon,
                offset,
                cos.data_ptr(),
                sin.data_ptr(),
                slots.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                keys.stride(0),
                q.data_ptr(),
                values_from_keys,
                torch.get_num_threads(),
            ),
        )

    @staticmethod
    def can_rotate(dim: int, rotary_dim: int) -> bool:
        """Whether heads of this size can be rotated."""
        return dim <= MOST_DIM and dim % 16 == 0 and 0 < rotary_dim <= dim and rotary_dim % 32 == 0

    def can_attend(self, dim: int) -> bool:
        """Whether there is attention for heads of this size."""
        return self.has_attention and dim <= MOST_DIM and dim % 32 == 0

    def attend(
        self,
        table: PageTable,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        causal: bool = True,
    ) -> None:
        """q (tokens, heads, dim) against pools (kv_heads, pool tokens, dim) → out, shaped as q."""
        tokens, heads, dim = q.shape
        kv_heads, pool_tokens, _ = keys.shape
        assert self.can_attend(dim) and heads % kv_heads == 0, (q.shape, keys.shape)
        assert keys.shape == values.shape == (kv_heads, pool_tokens, dim), (keys.shape, values.shape, dim)
        assert table.most_tokens <= pool_tokens < 2**31, (table.most_tokens, pool_tokens)
        assert out.shape == q.shape and len(table.starts) == len(table.lengths) + 1, (out.shape, q.shape)
        for tensor in (q, keys, values, out):
            assert tensor.dtype is torch.bfloat16 and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
        wanted = Attention(
            q.data_ptr(),
            heads * dim,
            out.data_ptr(),
            heads * dim,
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            kv_heads,
            heads // kv_heads,
            dim,
            *table.arguments(),
            scale,
            softcap or 0.0,
            window or 0,
            causal,
            torch.get_num_threads(),
        )
        if self.functions.quartet_attention(self.kernels, wanted):
            raise MemoryError(f"no memory for the attention of {tokens} tokens")


def pointer_to(additions: Additions | None, rows: int) -> "ctypes._Pointer[Additions] | None":
    """What adapters add to products of so many rows, as an argument."""
    assert additions is None or additions.rows == rows, rows
    return None if additions is None else ctypes.pointer(additions)


def can_gate(n: int) -> bool:
    """Whether the halves of a product with n columns begin at whole blocks of a packed weight."""
    return n % (2 * BLOCK_COLUMNS) == 0


def padded(size: int, step: int) -> int:
    return -(-size // step) * step


def check_matrix(x: torch.Tensor) -> None:
    """Raise AssertionError unless x is a bfloat16 matrix on the CPU whose rows are contiguous."""
    assert x.dim() == 2 and x.dtype is torch.bfloat16 and x.device.type == "cpu", (x.shape, x.dtype, x.device)
    assert x.stride(1) == 1 or x.shape[1] == 1, x.stride()


def highest_wanted() -> str:
    """The highest instruction set that the environment allows, or "none"."""
    limits = [INSTRUCTION_SETS[-1]]
    if name := os.environ.get("QUARTET_CPU_ISA", "").lower():
        if name not in (*INSTRUCTION_SETS, "none"):
            raise ValueError(f"QUARTET_CPU_ISA is {name}; it may be one of {', '.join(INSTRUCTION_SETS)}, none")
        limits.append(name)
    limits.append(ONEDNN_NAMES.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), INSTRUCTION_SETS[-1]))
    return min(limits, key=("none", *INSTRUCTION_SETS).index)


def candidates() -> list[str]:
    """The instruction sets to try, best first."""
    highest = highest_wanted()
    if highest == "none":
        return []
    allowed = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(highest) + 1]
    found = [name for name in reversed(allowed) if build.may_have(name)]
    if highest == INSTRUCTION_SETS[-1] and build.multiplies_pairs_slowly():
        return [name for name in found if name != "avx512_bf16"]  # unless it was asked for
    return found


@lru_cache
def functions(instruction_set: str) -> ctypes.CDLL:
    """The loaded library for an instruction set. Raises CannotBuild."""
    with contextlib.suppress(OSError), build.built(instruction_set) as path:
        return ctypes.CDLL(str(path))
    try:
        with build.built(instruction_set, afresh=True) as path:  # what lay in the cache was damaged
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise build.CannotBuild(f"it cannot be loaded: {error}") from error


def load() -> Library | None:
    """Compile and load the library; None, and a log line, where that cannot be done."""
    if highest_wanted() == "none":
        return None
    for name in candidates():
        try:
            found = Library(functions(name), name)
        except LookupError:  # the system does not allow its use
            continue
        except build.CompilerRefused as reason:
            log.warning("The CPU kernels for %s cannot be compiled; a newer compiler may: %s.", name, reason)
            continue
        except build.CannotBuild as reason:
            log.warning("The CPU kernels cannot be compiled, and torch's serve, which are slower: %s.", reason)
            return None
        log.info("CPU kernels: %s", name)
        return found
    log.warning("There are no CPU kernels for this machine (they need AVX2). torch's serve, which are slower.")
    return None


_lock = threading.Lock()
_loading: "Future[Library | None] | None" = None


def start_loading() -> "Future[Library | None]":
    """Load the library in a thread of its own, once."""
    global _loading
    with _lock:
        if _loading is None:
            _loading = Future()
            threading.Thread(target=_fulfil, args=(_loading,), name="cpu-kernels", daemon=True).start()
        return _loading


def _fulfil(future: "Future[Library | None]") -> None:
    try:
        future.set_result(load())
    except BaseException as error:
        future.set_exception(error)


def library() -> Library | None:
    """The library, waited for if it is being compiled; None where there is none."""
    return start_loading().result()


def at_hand() -> Library | None:
    """The library if it is loaded already; does not wait."""
    return _loading.result() if _loading is not None and _loading.done() else None


def is_expected() -> bool:
    """Whether `library` will most likely give one; does not wait."""
    if _loading is not None and _loading.done():
        return _loading.result() is not None
    return bool(candidates()) and build.is_possible()
