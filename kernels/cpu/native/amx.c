/* All kernels, compiled for amx. */
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#include "attention.h"
#include "linear.h"
#include "rotation.h"

const struct kernels quartet_amx = {product, rotate, attention};
