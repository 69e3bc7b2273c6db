"""Write a tiny language model with a tokenizer of bytes; runs where transformers is installed."""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {each: i for i, each in enumerate(["<s>", "</s>", *letters])}
tokenizer = Tokenizer(models.BPE(vocabulary, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
wrapped.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
size = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=1, **size)
model = LlamaForCausalLM(config)
model.generation_config.do_sample = False
wrapped.save_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[1])
