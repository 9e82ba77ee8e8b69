/* All kernels, compiled for avx2. */
#pragma GCC target("avx2,fma")

#include "linear.h"

const struct kernels quartet_avx2 = {product};
