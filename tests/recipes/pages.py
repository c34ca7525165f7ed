"""Every training page, small: what tests of all pages run."""

from typing import Any

from tests.recipes import (
    test_bert_finetune,
    test_bert_pretrain,
    test_gpt_finetune,
    test_gpt_pretrain,
    test_resnet_finetune,
    test_resnet_pretrain,
    test_resnet_pretrain_rsb,
    test_text_to_image_finetune,
    test_text_to_image_pretrain,
    test_text_to_image_pretrain_transformer,
    test_text_to_image_train_vae,
)

# Of the module that tests a page, whose `config_of` takes them: the page's fixture, then those of its data.
PAGES: dict[str, tuple[Any, list[str]]] = {
    "gpt": (test_gpt_pretrain, ["corpus"]),
    "gpt_finetune": (test_gpt_finetune, ["causal", "messages"]),
    "bert": (test_bert_pretrain, ["sentences_file"]),
    "bert_finetune": (test_bert_finetune, ["encoder", "labelled"]),
    "resnet": (test_resnet_pretrain, ["shapes"]),
    "resnet_rsb": (test_resnet_pretrain_rsb, ["shapes"]),
    "resnet_finetune": (test_resnet_finetune, ["classifier", "shapes"]),
    "vae": (test_text_to_image_train_vae, ["shapes"]),
    "pretrain": (test_text_to_image_pretrain, ["latents", "tiny_vae"]),
    "pretrain_transformer": (test_text_to_image_pretrain_transformer, ["latents", "tiny_vae"]),
    "text_to_image_finetune": (test_text_to_image_finetune, ["tiny_pipeline", "captioned"]),
}
