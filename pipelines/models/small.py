"""Small models that are no transformers, for students of another kind: an LSTM, convolutions, the mean of token vectors.

Importing this module registers them, so that transformers' Auto classes open their directories. Their ONNX graphs need none of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel

FILTERS = (1, 3, 5)  # tokens that a filter of the convolutional text classifier reads: as many on either side
LARGEST_SIDE = 8  # of the maps of an image that the dense layer reads


class TextConfig(PreTrainedConfig):
    """`width` is that of the token vectors, `hidden` the number of units that read them."""

    vocab_size: int = 0
    pad_token_id: int | None = None
    width: int = 128
    hidden: int = 128
    dropout: float = 0.1


class LstmConfig(TextConfig):
    model_type = "pocketformers_lstm"


class TextCnnConfig(TextConfig):
    model_type = "pocketformers_text_cnn"


class StaticConfig(TextConfig):
    model_type = "pocketformers_static"


class ImageCnnConfig(PreTrainedConfig):
    """`width` is the number of channels of the first convolution, `hidden` the units of the dense layer."""

    model_type = "pocketformers_image_cnn"
    num_channels: int = 3
    image_size: list[int] | tuple[int, int] = (32, 32)
    width: int = 16
    hidden: int = 128
    dropout: float = 0.1


class Lstm(nn.Module):
    """The last states of a bidirectional LSTM, one after the other (Tang et al., 2019)."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.lstm = nn.LSTM(config.width, config.hidden, batch_first=True, bidirectional=True)
        self.features = 2 * config.hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors, lengths = self.embed_tokens(input_ids), attention_mask.sum(dim=1)
        if torch.onnx.is_in_onnx_export():
            last = self._onnx_operator(vectors, lengths)
        else:
            packed = pack_padded_sequence(vectors, lengths.cpu(), batch_first=True, enforce_sorted=False)
            last = self.lstm(packed)[1][0]
        return last.transpose(0, 1).flatten(1)  # of (directions, batch, hidden)

    def _onnx_operator(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """The operator LSTM, which reads each text to its own length, as packed sequences do, and has its gates in another order."""
        batch, tokens, _ = vectors.shape
        hidden = self.lstm.hidden_size

        def both(name: str) -> Tensor:
            weights = torch.stack([getattr(self.lstm, name), getattr(self.lstm, f"{name}_reverse")])
            return weights.unflatten(1, (4, hidden))[:, [0, 3, 1, 2]].flatten(1, 2)

        biases = torch.cat([both("bias_ih_l0"), both("bias_hh_l0")], dim=1)
        inputs = (vectors.transpose(0, 1), both("weight_ih_l0"), both("weight_hh_l0"), biases, lengths.int())
        _, last = torch.onnx.ops.symbolic_multi_out(
            "LSTM",
            inputs,
            {"direction": "bidirectional", "hidden_size": hidden},
            dtypes=(vectors.dtype, vectors.dtype),
            shapes=((tokens, 2, batch, hidden), (2, batch, hidden)),
        )
        return last


class TextCnn(nn.Module):
    """The largest value over a text of each filter, as by Kim (2014), with filters of 1, 3 and 5 tokens for 3, 4 and 5."""

    def __init__(self, config: TextCnnConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.filters = nn.ModuleList(
            nn.Conv1d(config.width, config.hidden, size, padding=size // 2) for size in FILTERS
        )
        self.features = len(FILTERS) * config.hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, None].to(self.embed_tokens.weight.dtype)
        vectors = (
            self.embed_tokens(input_ids).transpose(1, 2) * mask
        )  # (batch, width, tokens): zeros, as beyond the end
        found = torch.cat([one(vectors) for one in self.filters], dim=1)
        return (found.relu() * mask).amax(dim=2)


class Static(nn.Module):
    """A hidden layer over the mean of a text's token vectors."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.dense = nn.Linear(config.width, config.hidden)
        self.features = config.hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, None].to(self.embed_tokens.weight.dtype)
        sums = (mask @ self.embed_tokens(input_ids)).squeeze(1)
        return self.dense(sums / mask.sum(dim=2)).relu()


class ImageCnn(nn.Module):
    """Convolutions, each followed by a pooling that halves the sides, and a dense layer, as in LeNet (LeCun et al., 1998)."""

    def __init__(self, config: ImageCnnConfig) -> None:
        super().__init__()
        (height, width), channels = config.image_size, config.num_channels
        layers: list[nn.Module] = []
        while len(layers) < 6 or max(height, width) > LARGEST_SIDE:  # two convolutions or more
            maps = config.width * 2 ** (len(layers) // 3)
            halved = (min(2, height), min(2, width))  # a side of one pixel stays
            layers += [nn.Conv2d(channels, maps, 3, padding=1), nn.ReLU(), nn.MaxPool2d(halved)]
            height, width, channels = height // halved[0], width // halved[1], maps
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * height * width, config.hidden), nn.ReLU()
        )
        self.features = config.hidden

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.layers(pixel_values)
        return found


class SmallModel(PreTrainedModel):
    """An encoder with `features` numbers for each example, and a linear head."""

    encoder_class: Any
    auto_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.encoder.features, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        getattr(module, "reset_parameters", lambda: None)()  # torch's own beginning, not a transformer's

    def start_from(self, teacher: Any) -> None:
        """Take what fits of a teacher's weights: nothing."""


class TextModel(SmallModel):
    auto_class = AutoModelForSequenceClassification

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(self.encoder(input_ids, mask))))

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.encoder.embed_tokens
        return table

    def start_from(self, teacher: Any) -> None:
        """Take the teacher's token vectors, in their principal components where they are wider than the student's, with a standard
        deviation of 1; what the student's are wider begins with zeros."""
        from sklearn.decomposition import PCA

        own: Any = self.get_input_embeddings().weight
        vectors = teacher.get_input_embeddings().weight.detach().float().cpu().numpy()
        width = min(own.shape[1], *vectors.shape)
        if width < vectors.shape[1]:
            vectors = PCA(width, random_state=0).fit_transform(vectors)
        with torch.no_grad():
            own.zero_()[:, :width] = torch.from_numpy(vectors / vectors.std())


class LstmForSequenceClassification(TextModel):
    config_class, encoder_class = LstmConfig, Lstm


class TextCnnForSequenceClassification(TextModel):
    config_class, encoder_class = TextCnnConfig, TextCnn


class StaticForSequenceClassification(TextModel):
    config_class, encoder_class = StaticConfig, Static


class ImageCnnForImageClassification(SmallModel):
    config_class, encoder_class = ImageCnnConfig, ImageCnn
    auto_class, main_input_name = AutoModelForImageClassification, "pixel_values"

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.dropout(self.encoder(pixel_values))))


for own in (
    LstmForSequenceClassification,
    TextCnnForSequenceClassification,
    StaticForSequenceClassification,
    ImageCnnForImageClassification,
):
    AutoConfig.register(own.config_class.model_type, own.config_class)
    own.auto_class.register(own.config_class, own)
