/* All kernels, compiled for avx2. */
#pragma GCC target("avx2,fma")

#include "linear.h"
#include "rotation.h"

const struct kernels quartet_avx2 = {product, rotate, 0};
