/* The kernels that every instruction set has, and the table of them. A file for each instruction set includes this. */
#pragma once

#include "adapters_float.h"
#include "draw.h"
#include "linear.h"
#include "recurrent.h"
#include "rotation.h"
#include "rows.h"
#include "streams.h"

#define ALL_KERNELS(attention)                                                                                  \
    {                                                                                                           \
        product, takes_tiles, rotate, attention, norm, add_normed, add_weighted, add_float, convolve, recur, draw,           \
            log_of_sums, gate_rows, gate_sparse, predict, correct, spread,                                      \
    }
