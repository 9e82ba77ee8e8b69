/* All kernels, compiled for amx. */
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx512vbmi,amx-tile,amx-bf16,amx-int8")

#include "attention.h"
#include "all.h"

const struct kernels quartet_amx = ALL_KERNELS(attention);
