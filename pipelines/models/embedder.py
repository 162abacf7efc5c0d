"""Embedders: an encoder whose tokens' states become one vector, by pooling, dense layers and normalization.

On disk an embedder is a directory of sentence-transformers: the encoder as transformers saves it, modules.json, and a folder for each
further module. These are four small JSON files, so that neither reading nor writing them needs that library. In memory it is the encoder's
own class with more after it: layers, heads and neurons are where they are in any model of the family.
"""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.hub import cached_file

from pipelines.core.disk import write_json
from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.data.sources import check_safetensors
from pipelines.models.loading import check_finite, load_config, load_weights, new_model
from pipelines.models.small import TextConfig
from pipelines.runtime.infer import one_line

logger = logging.getLogger(__name__)

MODULES, WEIGHTS, LIBRARY = "modules.json", "model.safetensors", "config_sentence_transformers.json"
SETTINGS = "sentence_embedding"  # what a config says of all that comes after the encoder
# How the vectors of the tokens become one, by our names and by those of the switches in 1_Pooling/config.json.
POOLINGS = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "lasttoken": "lasttoken",
    "weightedmean": "weightedmean_tokens",
}
IDENTITY = "torch.nn.modules.linear.Identity"
ACTIVATIONS = {IDENTITY: nn.Identity, "torch.nn.modules.activation.Tanh": nn.Tanh}
ACTIVATIONS |= {f"torch.nn.modules.activation.{one.__name__}": one for one in (nn.ReLU, nn.GELU)}
SIF = 1e-4  # the a of a / (a + p) (Arora et al., 2017), as Model2Vec has it


@dataclass
class SentenceOutput(ModelOutput):
    """`token_embeddings` (batch, tokens, width) of the encoder, and `sentence_embedding` (batch, size)."""

    token_embeddings: Tensor | None = None
    sentence_embedding: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def pool(tokens: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector (batch, width) of token vectors (batch, tokens, width): a weighted mean, in which padding on either side has no weight.

    `mean` weighs all tokens the same, `weightedmean` each by its place (Muennighoff, 2022), `cls` the first alone, `lasttoken` the last.
    """
    weights = mask
    if how != "mean":
        place = mask.cumsum(dim=1)
        last = place[:, -1:]
        weights = mask * {"weightedmean": place, "cls": place == 1, "lasttoken": place == last}[how]
    weights = weights.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


class Embedder:
    """What follows the encoder: mixed into the encoder's own class by embedder_class()."""

    config: Any
    dense: nn.ModuleList

    def __init__(self, config: Any) -> None:
        super().__init__(config, **without_pooler(type(self)))  # type: ignore[call-arg]
        self.add_dense()

    def add_dense(self) -> None:
        """The dense layers that the config names, with random weights; no pooler of the encoder's own, which nothing reads."""
        if getattr(self, "pooler", None) is not None:
            self.pooler = None
        shapes = getattr(self.config, SETTINGS)["dense"]
        layers = (nn.Linear(one["in_features"], one["out_features"], one["bias"]) for one in shapes)
        self.dense = nn.ModuleList(layers)

    def append_dense(self, size: int, weight: np.ndarray | None = None) -> None:
        """One more linear map, to vectors of `size`, with the `weight` (size, width) where it is given."""
        settings = getattr(self.config, SETTINGS)
        shape = {"in_features": width_of(self.config), "out_features": size, "bias": False}
        settings["dense"] = [*settings["dense"], shape | {"activation_function": IDENTITY}]
        layer = nn.Linear(shape["in_features"], size, bias=False)
        if weight is not None:
            layer.weight.data.copy_(torch.from_numpy(weight))
        self.dense.append(layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **keywords: Any,
    ) -> SentenceOutput:
        assert input_ids is not None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is not None:  # which not every encoder takes
            keywords["token_type_ids"] = token_type_ids
        found = super().forward(input_ids=input_ids, attention_mask=attention_mask, **keywords)  # type: ignore[misc]
        settings = getattr(self.config, SETTINGS)
        vectors = pool(found.last_hidden_state, attention_mask, settings["pooling"])
        for layer, shape in zip(self.dense, settings["dense"], strict=True):
            vectors = ACTIVATIONS[shape["activation_function"]]()(layer(vectors))
        if settings["normalize"]:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return SentenceOutput(
            token_embeddings=found.last_hidden_state,
            sentence_embedding=vectors,
            hidden_states=found.get("hidden_states"),
            attentions=found.get("attentions"),
        )

    def start_from(self, teacher: Any) -> None:
        """Of a static embedder: see token_vectors."""
        own: Any = self.get_input_embeddings().weight  # type: ignore[attr-defined]
        with torch.no_grad():
            own.copy_(torch.from_numpy(token_vectors(teacher, self.config)))

    def save_pretrained(self, directory: Any, **keywords: Any) -> None:
        """Write the layout of sentence-transformers; a checkpoint, for which the Trainer names a state_dict, is one file of all weights."""
        saver: Any = super()
        if "state_dict" in keywords:
            saver.save_pretrained(directory, **keywords)
            return
        state: dict[str, Tensor] = self.state_dict()  # type: ignore[attr-defined]
        own = {name: values for name, values in state.items() if not name.startswith("dense.")}
        saver.save_pretrained(directory, state_dict=own, **keywords)
        write_modules(self, Path(directory))


def without_pooler(model_class: Any) -> dict[str, bool]:
    """What keeps an encoder's class from making a pooler, where it has one."""
    bases = (one for one in model_class.__mro__ if "add_pooling_layer" in inspect.signature(one.__init__).parameters)
    return {"add_pooling_layer": False} if next(bases, None) is not None else {}


@cache
def embedder_class(encoder_class: Any) -> Any:
    """The class of an encoder with what follows it, under the encoder's own name, which is written into config.json."""
    return type(encoder_class.__name__, (Embedder, encoder_class), {"__module__": __name__})


def width_of(config: Any) -> int:
    """The size of an embedder's vectors."""
    dense = getattr(config, SETTINGS)["dense"]
    return int(dense[-1]["out_features"] if dense else config.get_text_config().hidden_size)


# ---- Reading


def is_embedder(located: str) -> bool:
    """Whether a directory, or a Hub id, has the modules of an embedder."""
    return _file(located, MODULES) is not None


def _file(located: str, name: str) -> Path | None:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(located, name, **quiet)
    return None if found is None else Path(str(found))


def embedder_config(source: str, pooling: str | None = None, **code: bool) -> Any:
    """The config of the encoder in `source` with the settings of what follows it: those of its modules.json, or of a config.json that we
    wrote; of an encoder alone `pooling` and normalization. Raises InputError where there is none of them."""
    config = load_config(source, **code)
    settings = read_modules(resolve(source)) or getattr(config, SETTINGS, None)
    if isinstance(config, StaticVectorsConfig):
        pooling = "mean"
    if settings is None:
        if pooling is None:
            raise InputError(
                f"expected an embedder in {source}, a directory of sentence-transformers with its {MODULES}, found an encoder alone. Pass "
                f"--pooling ({', '.join(POOLINGS)}): how the vectors of its tokens become one."
            )
        settings = {"pooling": pooling, "dense": [], "normalize": True}
    setattr(config, SETTINGS, settings)
    return config


def read_modules(located: str) -> dict[str, Any] | None:
    """What modules.json says: the pooling, the dense layers in their order, and whether vectors are normalized; None without that file."""
    listed = _file(located, MODULES)
    if listed is None:
        return None
    _tell_of_prompt(located)
    settings: dict[str, Any] = {"pooling": None, "dense": [], "normalize": False}
    for module in _read(listed):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        file = _file(located, f"{path}/config.json") if path else None
        own = _read(file) if file else {}
        if kind in ("Transformer", "StaticEmbedding") and path == "":
            settings["pooling"] = "mean"
        elif kind == "Pooling" and _pooling(own) in POOLINGS:
            settings["pooling"] = _pooling(own)
        elif kind == "Dense" and not settings["normalize"] and _is_plain(own):
            settings["dense"].append({"bias": True, **own, "path": path})
        elif kind == "Normalize":
            settings["normalize"] = True
        else:
            raise InputError(
                f"expected an encoder at the top of {located}, then pooling ({', '.join(POOLINGS)}), Dense and Normalize, found the module "
                f"{module['type']} at {path!r} with {own}. Use another model."
            )
    if settings["pooling"] is None:
        raise InputError(f"expected a module that pools in {listed}, found none. Copy the whole directory again.")
    return settings


@cache  # once for each model
def _tell_of_prompt(located: str) -> None:
    """Say where sentence-transformers would put a prompt before every text, which nothing here does."""
    file = _file(located, LIBRARY)
    said = _read(file) if file else {}
    if prompt := (said.get("prompts") or {}).get(said.get("default_prompt_name")):
        logger.warning(
            "texts are read without the prompt %r, which sentence-transformers puts before each for %s; write it into the texts",
            prompt,
            located,
        )


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"expected JSON of sentence-transformers in {file}, found: {error}. Copy or download the file again."
        ) from error


def _pooling(own: dict[str, Any]) -> str:
    """The one pooling of a module, which older and newer versions write in two ways."""
    named = own.get("pooling_mode")
    switched = [name for name, switch in POOLINGS.items() if own.get(f"pooling_mode_{switch}")]
    others = [name for name, value in own.items() if name.startswith("pooling_mode_") and value is True]
    if named is None and len(switched) == len(others) == 1:
        return switched[0]
    return str(named)


def _is_plain(own: dict[str, Any]) -> bool:
    return own.get("activation_function") in ACTIVATIONS and not own.get("use_residual")


def load_embedder(source: str, config: Any = None, from_scratch: bool = False, **code: bool) -> Any:
    """The embedder in `source`, in float32; `config` is what embedder_config() made of it. `from_scratch` gives it random weights.

    Raises InputError where weights are missing.
    """
    config = config or embedder_config(source, None, **code)
    if from_scratch:
        model = new_model(AutoModel, source, config, **code)
    else:
        encoder = AutoModel._model_mapping.get(type(config), object)
        model = load_weights(AutoModel, source, config, **without_pooler(encoder), **code)
    encoder_class: Any = type(model)
    model.__class__ = embedder_class(encoder_class)
    model.add_dense()
    if not from_scratch:
        for layer, shape in zip(model.dense, getattr(config, SETTINGS)["dense"], strict=True):
            file = _file(resolve(source), f"{shape['path']}/{WEIGHTS}")
            if file is None:
                raise InputError(
                    f"expected safetensors weights of the Dense module in {source}/{shape['path']}, found none. Save the model again with "
                    "sentence-transformers 3 or newer."
                )
            check_safetensors(file)
            found = {name.removeprefix("linear."): one for name, one in load_file(file).items()}
            try:
                layer.load_state_dict(found)
            except RuntimeError as error:
                raise InputError(
                    f"expected weights of the shape that config.json beside {file} says, found others: {one_line(error)}. Copy the whole "
                    "directory again."
                ) from error
        check_finite(model.dense, source)
    return model


# ---- Writing


def write_modules(model: Any, directory: Path) -> None:
    """modules.json and what it names, as sentence-transformers reads it, in the forms that its older versions know, too."""
    settings, config = getattr(model.config, SETTINGS), model.config
    modules: list[tuple[str, str]] = []
    if isinstance(config, StaticVectorsConfig):
        modules.append(("StaticEmbedding", ""))
    else:
        modules += [("Transformer", ""), ("Pooling", "1_Pooling")]
        switches = {f"pooling_mode_{switch}": name == settings["pooling"] for name, switch in POOLINGS.items()}
        switches |= {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
        _write(directory / "1_Pooling", {"word_embedding_dimension": config.get_text_config().hidden_size, **switches})
        if "max_length" in settings:
            length = {"max_seq_length": settings["max_length"], "do_lower_case": False}
            write_json(directory / "sentence_bert_config.json", length)
    for layer, shape in zip(model.dense, settings["dense"], strict=True):
        shape["path"] = f"{len(modules)}_Dense"
        modules.append(("Dense", shape["path"]))
        _write(directory / shape["path"], {name: value for name, value in shape.items() if name != "path"})
        weights = {f"linear.{name}": values.contiguous() for name, values in layer.state_dict().items()}
        save_file(weights, directory / shape["path"] / WEIGHTS, {"format": "pt"})
    if settings["normalize"]:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(modules)
    ]
    (directory / MODULES).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    write_json(directory / LIBRARY, {"prompts": {}, "similarity_fn_name": "cosine"})
    config.save_pretrained(directory)  # with the folders of the dense layers


def _write(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)


# ---- A static embedder


class StaticVectorsConfig(TextConfig):
    """`width` is that of the token vectors; the tokens are those of a text without any special ones."""

    model_type = "pocketformers_static_vectors"
    cls_token_id: int | None = None
    sep_token_id: int | None = None

    @property
    def hidden_size(self) -> int:
        return self.width


class StaticVectors(PreTrainedModel):
    """A vector for each token, whatever stands around it: with mean pooling the StaticEmbedding of sentence-transformers."""

    config_class = StaticVectorsConfig

    def __init__(self, config: StaticVectorsConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        getattr(module, "reset_parameters", lambda: None)()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids))


AutoConfig.register(StaticVectorsConfig.model_type, StaticVectorsConfig)
AutoModel.register(StaticVectorsConfig, StaticVectors)


def token_vectors(teacher: Any, config: StaticVectorsConfig) -> np.ndarray:
    """The teacher's vector of each token alone (tokens, width), in their principal components, rare tokens with the more weight.

    As Model2Vec makes them (Tulkens & van Dongen, 2024): SIF weighting by Zipf's law, since tokenizers number frequent tokens first.
    """
    from sklearn.decomposition import PCA

    ids = torch.arange(config.vocab_size)
    around = (config.cls_token_id, config.sep_token_id)
    first, last = (torch.full_like(ids, one or 0) for one in around)
    texts = torch.stack([ids] if None in around else [first, ids, last], dim=1)
    with torch.inference_mode():
        parts = [teacher.eval()(input_ids=part.to(teacher.device)).sentence_embedding for part in texts.split(1024)]
    vectors = torch.cat(parts).float().cpu().numpy()
    width = min(config.width, *vectors.shape)
    vectors = PCA(width, random_state=0).fit_transform(vectors)
    chance = 1 / np.arange(2, len(vectors) + 2)
    vectors *= (SIF / (SIF + chance / chance.sum()))[:, None]
    return np.pad(vectors / vectors.std(), ((0, 0), (0, config.width - width))).astype(np.float32)
