"""A script: what the model, as it is trained, gives as log-probabilities of sampled ids. In and out: JSON."""

import json
import sys
from pathlib import Path

import torch

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.parallel import destroy, initialize


def main(weights: str, sampled: str, found: str) -> None:
    config, layout = ModelConfig.from_hugging_face(weights), LayoutConfig()
    initialize(layout, seed=0)
    model = build_model(config, layout).train()
    load_hugging_face([model], config, weights)
    values = []
    for prompt, generated in json.loads(Path(sampled).read_text()):
        ids = torch.tensor([[*prompt, *generated]])
        positions = torch.arange(ids.shape[1] - 1)[None]
        with torch.no_grad():
            losses = model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous())
        values.append((-losses[0, len(prompt) - 1 :]).tolist())
    Path(found).write_text(json.dumps(values))
    destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
