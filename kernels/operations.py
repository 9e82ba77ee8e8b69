"""The fused operations: the signature of each of them, and what it computes.

An implementation is a module with one function for each method of `Ops`, of the same signature:
`kernels/reference/operations.py` in torch, the specification, and `kernels/triton/operations.py`.
"""

from typing import Protocol

from torch import Tensor

from quartet.kernels.recurrent_operations import RecurrentOps


class Ops(RecurrentOps, Protocol):
    """The signatures of all fused operations; those of recurrent layers are in recurrent_operations.py.

    Results are written to tensors that the caller gives. Arithmetic is float32, rounded once where a result is stored.
    Where an operation has a norm, `norm_weight` (in,), `epsilon` and `plus_one` (the weight is stored as its distance
    from one) describe a root-mean-square norm of its input. `activation` is "silu", "gelu" or "gelu_tanh".
    `counters` are int32, zeros before and after. `partials` are float32 scratch memory. Torch uses neither of them.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, plus_one: bool, out: Tensor) -> None:
        """out = x (rows, columns) over its root mean square, times weight (columns,)."""

    def gated_activation(self, gate_up: Tensor, activation: str, out: Tensor) -> None:
        """out (rows, size) = activation(first half) * second half of gate_up (rows, 2 * size)."""

    def gemv(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """out = x (tokens, in) @ weight.T (out, in) + bias + residual (tokens, out), for up to 4 tokens.

        `out` may be the residual itself.
        """

    def norm_gate_up(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        plus_one: bool,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        out: Tensor,
    ) -> None:
        """out (tokens, size) = activation(gate) * up, the halves of norm(x) @ weight.T + bias, for up to 4 tokens.

        x (tokens, in), weight (2 * size, in). Without norm_weight, x is taken as it is.
        """

    def skinny(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        partials: Tensor,
        counters: Tensor,
        out: Tensor,
        block: int | None = None,
    ) -> None:
        """out = x (tokens, in) @ weight.T (out, in) + bias + residual (tokens, out), for up to 64 tokens.

        `out` may be the residual itself. `partials` and `counters` are as large as `skinny_workspace` says. Tokens
        are computed in blocks of `block` (16, 32 or 64), by default the smallest block that holds them all.
        """

    def skinny_gated(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        partials: Tensor,
        counters: Tensor,
        out: Tensor,
        block: int | None = None,
    ) -> None:
        """out (tokens, size) = activation(gate) * up, the halves of x @ weight.T + bias; the rest as in `skinny`."""

    def adapter_shrink(self, x: Tensor, a: Tensor, tiles: Tensor, order: Tensor, out: Tensor) -> None:
        """out[row] (parts * rank,) = a[slot] @ x[row] for tokens with LoRA adapters; x (tokens, in).

        a (slots, parts, rank, in): the parts are weights that are fused in one product. Each of `tiles` (tiles, 4)
        int32 is a slot, where its tokens begin in `order` int32, how many they are, at most 16, and the adapter's own
        rank. Ranks of each part beyond that, and other tokens, are left as they are. Where `out` has several rows for
        each of x, as for experts, these share it.
        """

    def adapter_expand(
        self, x: Tensor, first: int, b: Tensor, tiles: Tensor, order: Tensor, out: Tensor, column: int
    ) -> None:
        """out[row, column :] += b[slot] @ x[row, first : first + rank]: b (slots, columns, rank), the rest as above.

        Of both only the adapter's own rank is read.
        """

    def norm_qkv_rope_kv(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        plus_one: bool,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        q: Tensor,
    ) -> None:
        """Norm, project (rows of weight: queries, keys, values), rotate; for up to 4 tokens.

        x (tokens, hidden) → q (tokens, heads, dim); keys and values go to the places `slots` (tokens,) of the pools
        (kv_heads, pool tokens, dim). cos and sin (tokens, 1, dim): the rotation covers whole heads.
        """

    def rope_kv(
        self,
        qkv: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        epsilon: float,
        plus_one: bool,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        q: Tensor,
    ) -> None:
        """The part after the projection: qkv (tokens, (heads + 2 * kv_heads) * dim) → q and the pools.

        q, slots and pools as in `norm_qkv_rope_kv`. cos and sin (tokens, 1, rotary_dim); dimensions beyond are not
        rotated. query_norm and key_norm (dim,) are weights of norms per head, before the rotation; both or neither.
        """

    def paged_decode(
        self,
        q: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        page_table: Tensor,
        table_rows: Tensor | None,
        lengths: Tensor,
        page_size: int,
        longest: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        partials: Tensor,
        counters: Tensor,
        out: Tensor,
    ) -> None:
        """One query per sequence: q (rows, heads, dim) against pools (kv_heads, tokens, dim) → out (rows, heads, dim).

        Row i has the pages of page_table[table_rows[i]] (of page_table[i] without table_rows) and lengths[i] keys, at
        most `longest`; a row of length 0 gives zeros. `window`: keys that a query sees, with its own; None: all.
        `sinks` (heads,) are logits that take part in the softmax and have no value. `partials` and `counters` are as
        large as `decode_workspace` says.
        """

    def paged_extend(
        self,
        q: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        page_table: Tensor,
        table_rows: Tensor | None,
        starts: Tensor,
        lengths: Tensor,
        page_size: int,
        most_queries: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        causal: bool,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        """Several queries per sequence: q (tokens, heads, dim) → out (tokens, heads, dim).

        Sequence i has the tokens starts[i] to starts[i + 1], at most `most_queries`: the last of its lengths[i]
        positions. With a length of 0 it gets zeros. If not `causal`, every query sees every key. Pools, pages,
        `window` and `sinks` are as in `paged_decode`.
        """

    def router(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        plus_one: bool,
        weight: Tensor,
        shared_gate: Tensor | None,
        renormalize: bool,
        logits: Tensor,
        counters: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> None:
        """Choose experts for norm(x) (tokens, hidden): ids (tokens, top_k) int32, best first, and weights (float32).

        weight (experts, hidden). With shared_gate (1, hidden) weights have one more column, its sigmoid. `logits`
        (tokens, experts and shared gate; float32) is left with the logits. `counters`: at least one for each token.
        """

    def choose_experts(
        self,
        logits: Tensor,
        renormalize: bool,
        ids: Tensor,
        weights: Tensor,
    ) -> None:
        """The part of `router` after the logits (tokens, experts), which a larger product has given."""

    def expert_gate_up(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        plus_one: bool,
        ids: Tensor,
        gate_up: Tensor,
        shared_gate_up: Tensor | None,
        activation: str,
        out: Tensor,
    ) -> None:
        """activation(gate) * up of each token's experts, gate_up (experts, 2 * size, hidden), and of the shared one.

        x (tokens, hidden) → out (tokens, top_k * size + shared size), in the order of ids (tokens, top_k).
        """

    def expert_down(
        self,
        inner: Tensor,
        ids: Tensor,
        weights: Tensor,
        down: Tensor,
        shared_down: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
    ) -> None:
        """The weighted sum of the experts' second halves: inner, as `expert_gate_up` leaves it, → out (tokens, hidden).

        down (experts, hidden, size), shared_down (hidden, shared size), weights as `router` leaves them. `out` may be
        the residual itself.
        """

    def align_experts(self, ids: Tensor, experts: int, block: int, pairs: Tensor, block_experts: Tensor) -> None:
        """Group (token, expert) pairs by expert, each group padded to whole blocks of `block` pairs; all int32.

        ids (tokens, top_k) → pairs, ids.numel() where padded, and block_experts, the expert of each block, -1 where
        unused. `block_experts` is long enough for any spread (`most_blocks`) and `pairs` has `block` entries for each
        of its entries. Entries of `pairs` beyond the used blocks are undefined.
        """

    def expert_gemm(
        self,
        x: Tensor,
        pairs: Tensor,
        block_experts: Tensor,
        block: int,
        weight: Tensor,
        activation: str | None,
        out: Tensor,
    ) -> None:
        """out (all pairs, size) = x @ weight[expert of the pair].T, with weight (experts, size, in).

        x (all pairs, in), or (tokens, in) where the pairs of a token share a row. With an activation weight is
        (experts, 2 * size, in) and out = activation(gate) * up.
        """

    def expert_sum(
        self,
        y: Tensor,
        weights: Tensor,
        shared: Tensor | None,
        shared_logits: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
    ) -> None:
        """out (tokens, hidden) = weighted sum of y + sigmoid(shared_logits) * shared + residual.

        y (tokens * top_k, hidden), weights (tokens, top_k), shared (tokens, hidden), shared_logits (tokens, 1). `out`
        may be the residual itself.
        """

    def lm_head_sample(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        plus_one: bool,
        weight: Tensor,
        softcap: float | None,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        slots: Tensor | None,
        logits: Tensor,
        tops: Tensor,
        masses: Tensor,
        counter: Tensor,
        tokens: Tensor,
        valid: Tensor,
    ) -> None:
        """A token for each of up to 64 rows of x (rows, hidden): tokens[slots[i]], or tokens[i] without slots.

        Logits are norm(x) @ weight.T (vocab, hidden), soft-capped, divided by temperatures (rows,), of which 0 is
        greedy. They are left in logits (rows, vocab), float32. seeds and positions (rows,) int64 determine the draw.
        A row whose slot is negative is not written. valid (rows,) int32: whether the largest logit is finite. tops
        and masses (rows, ceil(vocab / 64)), float32, and counter (1,), as `counters`, are scratch memory.
        """

    def process_logits(
        self,
        logits: Tensor,
        allowed: Tensor | None,
        temperatures: Tensor,
        tops: Tensor,
        masses: Tensor,
    ) -> None:
        """Mask and temperature, in place on logits (rows, vocab) float32.

        A token is allowed where its bit of `allowed`, int32 (rows, ceil(vocab / 32)), is set. A temperature of 0
        divides by 1. tops and masses (rows, tiles), float32, are what `draw` and `select` need to know of each tile
        of the result: the largest logit, and the sum of exp(logit - largest). Torch leaves them as they are.
        """

    def draw(
        self,
        logits: Tensor,
        tops: Tensor,
        masses: Tensor,
        block: int,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        slots: Tensor | None,
        tokens: Tensor,
        valid: Tensor,
    ) -> None:
        """A token for each row of what `process_logits` left: the first largest at temperature 0, else drawn.

        `block` is the number of logits of a tile of tops and masses. The other arguments are as in `lm_head_sample`.
        """

    def select(
        self,
        logits: Tensor,
        tops: Tensor,
        masses: Tensor,
        temperatures: Tensor,
        top_ks: Tensor,
        top_ps: Tensor,
        min_ps: Tensor,
        seeds: Tensor,
        positions: Tensor,
        candidates: Tensor,
        tokens: Tensor,
        valid: Tensor,
    ) -> None:
        """As `draw`, after the filters top-k, top-p and min-p: tokens[i] for row i.

        top_ks (rows,) int32, 0 is off; top_ps (rows,), 1 is off; min_ps (rows,), 0 is off. All filters look at the
        same distribution; tokens as likely as the last one that is kept are kept. candidates (rows, vocab), int32, is
        scratch memory.
        """

    def prepare(
        self,
        slots: Tensor,
        last_tokens: Tensor,
        next_positions: Tensor,
        finished: Tensor,
        page_table: Tensor,
        page_size: int,
        embedding: Tensor,
        scale: float,
        rotary: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        lengths: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """The inputs of a decode step, from what the slots hold.

        Row i gets the last token of slots[i] (rows,) and its position, which is then increased by one. Out:
        input_ids, positions, kv_slots (rows,) int64, lengths (rows,) int32 with the new key counted, x (rows, hidden)
        = embedding * scale, cos and sin (rows, 1, rotary_dim) from rotary (positions, 2, rotary_dim). A row whose
        slot is below 0 or finished gets token 0 at position 0, writes to the null page and has length 0.
        """
