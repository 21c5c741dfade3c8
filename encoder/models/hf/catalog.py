"""The families that have a class in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from encoder.base.errors import ModelError, shortened
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.albert import AlbertConfig
from encoder.models.bert import BertConfig, DistilBertConfig, RobertaConfig
from encoder.models.catalog import networks_of
from encoder.models.contract import ModelConfig
from encoder.models.electra import (
    ElectraDiscriminatorConfig,
    ElectraGeneratorConfig,
    ModernBertDiscriminatorConfig,
    ModernBertGeneratorConfig,
)
from encoder.models.hf.albert import ALBERT
from encoder.models.hf.bert import BERT, DISTILBERT, ROBERTA, model_type_of
from encoder.models.hf.bridge import Bridge
from encoder.models.hf.electra import ELECTRA
from encoder.models.hf.modernbert import MODERNBERT
from encoder.models.hf.xlnet import XLNET
from encoder.models.modernbert import ModernBertConfig
from encoder.models.xlnet import XlnetConfig

# by model_type of config.json
BRIDGES: dict[str, Bridge] = {
    b.model_type: b for b in (MODERNBERT, BERT, ROBERTA, DISTILBERT, ALBERT, XLNET, ELECTRA)
}
# for people: what can be read
TITLES = tuple(b.title for b in BRIDGES.values())
# the model_type that a model gets, by its settings and, where they are known, its special ids
CHOICES: dict[type, Callable[[Any, SpecialIds | None], str]] = {
    ModernBertConfig: lambda config, specials: MODERNBERT.model_type,
    BertConfig: model_type_of,
    RobertaConfig: model_type_of,
    DistilBertConfig: model_type_of,
    AlbertConfig: lambda config, specials: ALBERT.model_type,
    XlnetConfig: lambda config, specials: XLNET.model_type,
    ElectraGeneratorConfig: lambda config, specials: ELECTRA.model_type,
    ElectraDiscriminatorConfig: lambda config, specials: ELECTRA.model_type,
    ModernBertGeneratorConfig: lambda config, specials: MODERNBERT.model_type,
    ModernBertDiscriminatorConfig: lambda config, specials: MODERNBERT.model_type,
}


def bridge_of(config: ModelConfig, specials: SpecialIds | None = None) -> Bridge | None:
    """The bridge of a settings object's family, or None: it stays ours."""
    choose = CHOICES.get(type(config))
    if choose:
        return BRIDGES[choose(config, specials)]
    return None


def export_blocker(config: ModelConfig) -> str | None:
    """Why a model of this shape cannot become a Hugging Face folder, or None if it can.

    Of a model of several networks the one that is used afterwards is asked.
    """
    used = next(iter(networks_of(config).values()), config)
    bridge = bridge_of(used)
    if bridge is None:
        return "not to Hugging Face, which has no class for it"
    return bridge.blocker(used)


def bridge_of_settings(settings: Mapping[str, Any], *, where: str = "config.json") -> Bridge:
    """The bridge of a config.json by its model_type; for an unknown one the first, which says what is needed.

    Raises ModelError, opened by `where`, for architectures that are no list of texts: no bridge asks again.
    """
    said = settings.get("architectures")
    if said is not None and not _are_texts(said):
        raise ModelError(
            f"{where}: architectures is {shortened(repr(said), 80)}; needed: a list of one text, the name of a"
            " class, or nothing. Put the class that wrote the weights, or leave architectures out."
        )
    kind = settings.get("model_type")
    default = BRIDGES[MODERNBERT.model_type]
    if isinstance(kind, str):
        return BRIDGES.get(kind, default)
    return default


def _are_texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(one, str) for one in found)
