"""The folder in Hugging Face format that an export is to be like: what of it goes over into the export as it is.

Always (tests/integration/model/test_convert.py): it is of the same model, with the same tensors; those of a layer for
multi-token prediction that the checkpoint does not have are carried over bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.config import ConfigError
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.conversion.import_checkpoint import is_mtp
from megatron_klong.model.tensor_files import TensorPlace, check_names, find_tensors
from megatron_klong.model.weight_map import has_copies, weights

_SMALL_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
_MAY_DIFFER = ("num_nextn_predict_layers", "mtp_loss_weight", "router_bias_update_rate", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Like:
    """carried: tensors to take over; small_files: files to copy; copies: see `weights`."""

    config: ModelConfig
    carried: Sequence[TensorPlace]
    small_files: Sequence[Path]
    copies: bool


def read_like(folder: Path | None, config: ModelConfig) -> Like | None:
    """Raises ConfigError, WeightsError if the folder is of another model than `config`."""
    if folder is None:
        return None
    found = ModelConfig.from_hugging_face(folder)
    differing = [
        f"{name} {getattr(found, name)} there, {getattr(config, name)} in the checkpoint"
        for name in ModelConfig.model_fields
        if name not in _MAY_DIFFER and getattr(found, name) != getattr(config, name)
    ]
    if found.num_nextn_predict_layers < config.num_nextn_predict_layers:
        differing.append("num_nextn_predict_layers 0 there, 1 in the checkpoint")
    if differing:
        raise ConfigError(f"{folder / 'config.json'}: of another model ({', '.join(differing)}); give the same one's")
    tensors = find_tensors(folder)
    carried = [] if config.num_nextn_predict_layers else [one for one in tensors.values() if is_mtp(one.name, found)]
    copies = has_copies(tensors, config)
    own = {name for weight in weights(config, copies=copies).values() for name in weight.tensors}
    check_names(folder, tensors, own | {one.name for one in carried})
    if bool(carried) != (found.num_nextn_predict_layers > config.num_nextn_predict_layers):
        raise ConfigError(
            f"{folder / 'config.json'}: num_nextn_predict_layers {found.num_nextn_predict_layers}, but {len(carried)} "
            "tensors of such layers are there; mend it"
        )
    small = [folder / name for name in _SMALL_FILES if (folder / name).is_file()]
    return Like(config=found, carried=carried, small_files=small, copies=copies)
