"""Write a Llama of random weights as llama.cpp's server loads it; its tokens are bytes.

Run in the environment of `make llama`: `python tiny_gguf.py FILE`.
"""

import sys

import numpy as np
from gguf import GGUFWriter, TokenType

WIDTH, HEADS, BLOCKS, INNER = 64, 4, 2, 128

writer, rng = GGUFWriter(sys.argv[1], "llama"), np.random.default_rng(0)
writer.add_context_length(2048)
writer.add_embedding_length(WIDTH)
writer.add_block_count(BLOCKS)
writer.add_feed_forward_length(INNER)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(WIDTH // HEADS)

letters = "▁abcdefghijklmnopqrstuvwxyz0123456789"
tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens)
writer.add_token_scores([0.0] * len(tokens))
writer.add_token_types(kinds + [TokenType.NORMAL] * len(letters))
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)


def add(name: str, *shape: int) -> None:
    """Add a tensor; norms are ones."""
    found = np.ones(shape) if len(shape) == 1 else rng.normal(0.0, 0.2, shape)
    writer.add_tensor(f"{name}.weight", found.astype(np.float32))


add("token_embd", len(tokens), WIDTH)
for block in range(BLOCKS):
    for part in ("q", "k", "v", "output"):
        add(f"blk.{block}.attn_{part}", WIDTH, WIDTH)
    for part in ("gate", "up"):
        add(f"blk.{block}.ffn_{part}", INNER, WIDTH)
    add(f"blk.{block}.ffn_down", WIDTH, INNER)
    add(f"blk.{block}.attn_norm", WIDTH)
    add(f"blk.{block}.ffn_norm", WIDTH)
add("output_norm", WIDTH)
output = rng.normal(0.0, 0.2, (len(tokens), WIDTH))
output[:259] = -1e-3  # it says letters, and never that it has ended
writer.add_tensor("output.weight", output.astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
