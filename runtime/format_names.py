"""Names of the formats of tool calls and thoughts that `--tool-call-parser` and `--reasoning-parser` take."""

from typing import Literal

ToolCallParser = Literal[
    "auto",
    "none",
    "deepseekv3",
    "deepseekv31",
    "gemma3",
    "glm",
    "glm45",
    "glm47",
    "granite",
    "granite4",
    "hermes",
    "json",
    "kimi_k2",
    "llama3",
    "minimax-m2",
    "mistral",
    "olmo3",
    "phi4_mini_json",
    "pythonic",
    "qwen",
    "qwen25",
    "qwen3_coder",
    "smollm3",
]
ReasoningParser = Literal[
    "auto", "none", "deepseek-r1", "deepseek-v3", "glm45", "kimi", "qwen3", "qwen3-thinking", "step3"
]
