"""One process that reads an imported checkpoint: `convert_worker.py FOLDER LAYOUT-AS-JSON`, beside others.

Reads FOLDER/checkpoint and reference.pt; writes FOLDER/exported and difference.json, how far logits are from those.
"""

import json
import sys
from pathlib import Path

from megatron_klong.model.build import build_model
from megatron_klong.model.checkpoint_folder import read_checkpoint
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.hugging_face import save_hugging_face
from megatron_klong.model.load_megatron import load_megatron
from megatron_klong.model.parallel import destroy, initialize

# isort: split
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import distributed


def main(folder: Path, layout: LayoutConfig) -> None:
    initialize(layout, seed=1)
    config = read_checkpoint(folder / "checkpoint").model
    model = build_model(config, layout).eval()
    load_megatron([model], config, folder / "checkpoint")
    save_hugging_face([model], config, folder / "exported")
    reference = torch.load(folder / "reference.pt")
    ids = reference["ids"]
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(model(ids, torch.arange(ids.shape[1])[None], None))
    if distributed.get_rank() == 0:
        difference = (logits - reference["whole"]["logits"]).abs().max().item()
        (folder / "difference.json").write_text(json.dumps(difference))
    destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), LayoutConfig(**json.loads(sys.argv[2])))
