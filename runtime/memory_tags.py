"""What memory can be released for a while, and the names that clients have for it."""

WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"
TAGS = (WEIGHTS, KV_CACHE, CUDA_GRAPH)  # recorded graphs are dropped with any of them: they contain addresses of all
NEEDED = (WEIGHTS, KV_CACHE)  # for every step; a graph is recorded again when a step needs it
