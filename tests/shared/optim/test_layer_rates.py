import pytest
import torch
import transformers

from shared.optim.layer_rates import layer_depths, layer_groups

TINY = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
MODELS = {
    "bert": transformers.BertConfig(**TINY),
    "megatron-bert": transformers.MegatronBertConfig(**TINY),
    "roberta": transformers.RobertaConfig(**TINY),
    "modernbert": transformers.ModernBertConfig(**TINY, pad_token_id=0),
}
IMAGES = {
    "resnet": (transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 1]), 3),
    "convnext": (transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[2, 1], num_stages=2), 3),
    "vit": (transformers.ViTConfig(**{**TINY, "image_size": 8, "patch_size": 4}), 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_encoders_are_found(name: str) -> None:
    check(transformers.AutoModelForSequenceClassification.from_config(MODELS[name]), 3)


@pytest.mark.parametrize("name", IMAGES)
def test_blocks_of_image_models_are_found(name: str) -> None:
    check(transformers.AutoModelForImageClassification.from_config(IMAGES[name][0]), IMAGES[name][1])


def check(model: torch.nn.Module, num_blocks: int) -> None:
    names, depths = [name for name, _ in model.named_parameters()], layer_depths(model)
    assert set(depths) == set(range(num_blocks + 2))
    assert depths[0] == 0
    for name, depth in zip(names, depths, strict=True):
        if name.startswith("classifier"):
            assert depth == num_blocks + 1, name
    assert {depth for name, depth in zip(names, depths, strict=True) if "embeddings" in name or "embedder" in name} == {
        0
    }


def test_rates_fall_towards_the_embeddings() -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(MODELS["bert"])
    groups = layer_groups(model, 0.1, 0.5, 0.01)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates[id(model.classifier.weight)] == pytest.approx(0.1)
    assert rates[id(model.bert.encoder.layer[2].output.dense.weight)] == pytest.approx(0.05)
    assert rates[id(model.bert.encoder.layer[0].output.dense.weight)] == pytest.approx(0.0125)
    assert rates[id(model.bert.embeddings.word_embeddings.weight)] == pytest.approx(0.00625)
    for group in groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
    assert {group["lr"] for group in layer_groups(model, 0.1, 1.0, 0.0)} == {0.1}
