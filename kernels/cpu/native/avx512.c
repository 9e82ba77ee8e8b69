/* All kernels, compiled for avx512. */
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "adapters_float.h"
#include "linear.h"
#include "recurrent.h"
#include "rotation.h"
#include "rows.h"
#include "streams.h"

const struct kernels quartet_avx512 = {
    product, rotate, 0, norm, add_normed, add_weighted, add_float, convolve, recur,
    gate_rows, gate_sparse, predict, correct, spread,
};
