/* Into how many parts sequences are divided that compute together what they see of shared keys (attention.h). */
#pragma once

#include <stdint.h>

#define TILE_ROWS 16
#define TASK_TILES 16    /* tiles that share the reading of keys and values */
#define PARTS_A_THREAD 2 /* at least, where as many sequences share keys */
#define MOST_PARTS 4     /* for each thread that are looked at */
#define FEWEST_MEMBERS 4 /* of a part, unless their own keys cost more than reading the shared ones once more */

/* `count` sequences of one query and `group` query heads (TILE_ROWS at most) for each KV head share `keys` keys, and have
 * `own` others, all of them together; `threads` have time for them. A thread computes a part and a KV head from beginning
 * to end, the keys of each member included. So parts are more, up to `count`, where that ends sooner. */
static inline int64_t parts_for(int64_t count, int64_t group, int64_t kv_heads, int64_t keys, int64_t own,
                                int64_t threads) {
    int64_t most = TASK_TILES * TILE_ROWS / group, least = (count + most - 1) / most;
    int64_t even = (PARTS_A_THREAD * threads + kv_heads - 1) / kv_heads;
    if (even > count / FEWEST_MEMBERS)
        even = count / FEWEST_MEMBERS;
    if (least < even)
        least = even;
    int64_t fewest = (keys * count + own - 1) / own, best = least, best_cost = INT64_MAX;
    if (fewest > FEWEST_MEMBERS)
        fewest = FEWEST_MEMBERS;
    int64_t last = MOST_PARTS * threads / kv_heads + 1;
    if (last > count / fewest)
        last = count / fewest;
    for (int64_t parts = least; parts == least || parts <= last; parts++) {
        int64_t members = (count + parts - 1) / parts, tiles = (members * group + TILE_ROWS - 1) / TILE_ROWS;
        int64_t turns = (parts * kv_heads + threads - 1) / threads;
        int64_t cost = turns * (members * own / count + tiles * keys);
        if (cost < best_cost) {
            best_cost = cost;
            best = parts;
        }
    }
    return best;
}
