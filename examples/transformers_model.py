"""Loads a model of transformers, its weights through the daemon, and embeds a sentence.

python examples/transformers_model.py /models/all-MiniLM-L6-v2 "A sentence."
"""

import sys

import torch
import transformers

from penstock.client import StreamerClient

path, sentence = sys.argv[1], sys.argv[2]
config = transformers.AutoConfig.from_pretrained(path)
kind = getattr(transformers, config.architectures[0])
state = StreamerClient().load_state_dict(path)
model = kind.from_pretrained(None, config=config, state_dict=state).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(path)

with torch.inference_mode():
    hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state
embedding = torch.nn.functional.normalize(hidden.mean(dim=1))[0]
print(" ".join(f"{value:.6f}" for value in embedding.tolist()))
