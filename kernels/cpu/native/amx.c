/* All kernels, compiled for amx. */
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#include "linear.h"

const struct kernels quartet_amx = {product};
