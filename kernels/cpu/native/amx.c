/* All kernels, compiled for amx. */
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx512vbmi,amx-tile,amx-bf16")

#include "attention.h"
#include "adapters_float.h"
#include "linear.h"
#include "recurrent.h"
#include "rotation.h"
#include "rows.h"
#include "streams.h"

const struct kernels quartet_amx = {
    product, rotate, attention, norm, add_normed, add_weighted, add_float, convolve, recur,
    gate_rows, gate_sparse, predict, correct, spread,
};
