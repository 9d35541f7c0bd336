"""The whole of it in thirty lines: wrap a model, pack two groups, one forward, one backward."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ppcompile

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
packed = ppcompile.wrap(model)  # shares the model's parameters: training one trains the other

batch = ppcompile.pack(
    [
        ppcompile.Group(prompt=[5, 6, 7, 8, 9, 10], responses=[[11, 12, 13], [14, 15]]),
        ppcompile.Group(prompt=[20, 21, 22], responses=[[23], [24, 25, 26], [24, 27]]),
    ]
)
out = packed(batch)
out.logps.sum().backward()

print(f"log-probabilities of the {len(out.logps)} responses: {[round(x, 4) for x in out.logps.tolist()]}")
print(f"{batch.num_tokens} tokens computed in place of {batch.unpacked_tokens}: {batch.tokens_saved} saved")
print(f"gradient of the embedding: norm {model.get_input_embeddings().weight.grad.norm():.4f}")
