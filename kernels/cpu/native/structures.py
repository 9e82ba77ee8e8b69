"""The arguments of the compiled kernels: the structures of api.h, field by field."""

import ctypes


class Quantized(ctypes.Structure):
    """`struct quantized` of api.h."""

    owner: object = None  # keeps the memory alive

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("halves", ctypes.c_int32),
        ("offsets", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("scale_bits", ctypes.c_int32),
        ("rotated", ctypes.c_int32),
        ("row_bits", ctypes.c_int32),
        ("exact", ctypes.c_int32),
    )


class Part(ctypes.Structure):
    """`struct part` of api.h."""

    _fields_ = (
        ("first", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("place", ctypes.c_int64),
        ("b", ctypes.c_void_p),
    )


class Addition(ctypes.Structure):
    """`struct addition` of api.h."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("parts", ctypes.POINTER(Part)),
        ("count", ctypes.c_int64),
    )


class Additions(ctypes.Structure):
    """`struct additions` of api.h."""

    rows: int = 0  # that the owners are of
    owner: object = None  # keeps the memory alive

    _fields_ = (
        ("adapters", ctypes.POINTER(ctypes.c_void_p)),
        ("count", ctypes.c_int64),
        ("owners", ctypes.c_void_p),
    )


class Product(ctypes.Structure):
    """`struct product` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("norm_offset", ctypes.c_float),
        ("packed", ctypes.c_void_p),
        ("quantized", Quantized),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("number", ctypes.c_int64),
        ("additions", ctypes.POINTER(Additions)),
        ("x_tiles", ctypes.c_int32),
        ("out_tiles", ctypes.c_int32),
        ("next", ctypes.c_void_p),
    )


class Adding(ctypes.Structure):
    """`struct adding` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("additions", ctypes.POINTER(Additions)),
        ("threads", ctypes.c_int32),
    )


class Rotation(ctypes.Structure):
    """`struct rotation` of api.h."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("qkv_stride", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("rotary_dim", ctypes.c_int64),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("value_norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("norm_offset", ctypes.c_float),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("values_from_keys", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Attention(ctypes.Structure):
    """`struct attention` of api.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("page_starts", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("members", ctypes.c_void_p),
        ("sharing", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("causal", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    """`struct norm` of api.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("offset", ctypes.c_float))


class Rows(ctypes.Structure):
    """`struct rows` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("norm", Norm),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class Gating(ctypes.Structure):
    """`struct gating` of api.h."""

    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("cutoff", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Experts(ctypes.Structure):
    """`struct experts` of api.h."""

    _fields_ = (
        ("before", Norm),
        ("after", Norm),
        ("count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("renormalize", ctypes.c_int32),
        ("router", Product),
        ("gate_up", ctypes.POINTER(Product)),
        ("down", ctypes.POINTER(Product)),
        ("has_shared", ctypes.c_int32),
        ("shared_size", ctypes.c_int64),
        ("shared_gate_up", Product),
        ("shared_down", Product),
        ("shared_gate", Product),
        ("router_norm", Norm),
        ("router_scale", ctypes.c_float),
        ("expert_scale", ctypes.c_void_p),
        ("after_chosen", Norm),
        ("shared_before", Norm),
        ("shared_after", Norm),
    )


class Streams(ctypes.Structure):
    """`struct streams` of api.h."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("active", ctypes.c_int64),
        ("router", Product),
        ("predictions", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("before", Norm),
        ("after", Norm),
        ("left", Product),
        ("right", Product),
    )


class Layer(ctypes.Structure):
    """`struct layer` of api.h."""

    _fields_ = (
        ("qkv", Product),
        ("output", Product),
        ("gate_up", Product),
        ("down", Product),
        ("after_attention", Norm),
        ("after_mlp", Norm),
        ("experts", ctypes.POINTER(Experts)),
        ("input_gate", Product),
        ("input_projection", Product),
        ("after_input", Norm),
        ("scale", ctypes.c_void_p),
        ("streams", ctypes.POINTER(Streams)),
        ("cutoff", ctypes.c_float),
        ("sparse", ctypes.c_int32),
        ("rotation", Rotation),
        ("attention", Attention),
        ("rope", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """`struct step` of api.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("stack", ctypes.c_void_p),
        ("predicted", ctypes.c_void_p),
        ("beside", ctypes.c_void_p),
        ("said", ctypes.c_void_p),
        ("cosines", ctypes.POINTER(ctypes.c_void_p)),
        ("sines", ctypes.POINTER(ctypes.c_void_p)),
        ("slots", ctypes.c_void_p),
        ("page_size", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("page_starts", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("members", ctypes.c_void_p),
        ("sharing", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("additions", ctypes.POINTER(Additions)),
        ("wanted", ctypes.c_int64),
        ("wanted_rows", ctypes.c_void_p),
        ("wanted_starts", ctypes.c_void_p),
        ("final", Norm),
    )


class Drawing(ctypes.Structure):
    """`struct drawing` of api.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("allowed", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("temperatures", ctypes.c_void_p),
        ("top_ks", ctypes.c_void_p),
        ("top_ps", ctypes.c_void_p),
        ("min_ps", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("next", ctypes.c_long),
        ("failed", ctypes.c_int),
    )


class Summing(ctypes.Structure):
    """`struct summing` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("best", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("next", ctypes.c_long),
    )
