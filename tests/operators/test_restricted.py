from __future__ import annotations

import pytest
import torch

from thalweg.errors import InvalidInput
from thalweg.loss.layout import ParameterLayout
from thalweg.operators.restricted import (
    MODEL_BLOCKS,
    TRANSFORMER_BLOCKS,
    Restricted,
    blocks_of,
    coordinates,
)
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import eigenpairs

# Names as in the libraries themselves, with the block that each belongs to.
NAMED = {
    "Thalweg": {
        "token_embedding.weight": "embedding",
        "position_embedding.weight": "position",
        "layers.0.attention_norm.bias": "norm",
        "layers.0.attention.query.weight": "query_key",
        "layers.0.attention.key.bias": "query_key",
        "layers.1.attention.value.weight": "value_output",
        "layers.1.attention.output.weight": "value_output",
        "layers.1.feed_forward_norm.weight": "norm",
        "layers.1.feed_forward.2.weight": "feed_forward",
        "norm.weight": "norm",
        "head.weight": "head",
    },
    "the public code": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position",
        "transformer.h.0.ln_1.weight": "norm",
        "transformer.h.0.attn.q_attn.weight": "query_key",
        "transformer.h.0.attn.k_attn.weight": "query_key",
        "transformer.h.0.attn.v_attn.weight": "value_output",
        "transformer.h.0.attn.c_proj.weight": "value_output",
        "transformer.h.0.mlp.c_proj.weight": "feed_forward",
        "transformer.ln_f.weight": "norm",
    },
    "LLaMA": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "query_key",
        "model.layers.0.self_attn.v_proj.weight": "value_output",
        "model.layers.0.self_attn.o_proj.weight": "value_output",
        "model.layers.0.mlp.gate_proj.weight": "feed_forward",
        "model.layers.0.input_layernorm.weight": "norm",
        "lm_head.weight": "head",
    },
    "BERT": {
        "embeddings.word_embeddings.weight": "embedding",
        "embeddings.position_embeddings.weight": "position",
        "embeddings.LayerNorm.weight": "norm",
        "encoder.layer.0.attention.self.query.weight": "query_key",
        "encoder.layer.0.attention.self.value.bias": "value_output",
        "encoder.layer.0.attention.output.dense.weight": "value_output",
        "encoder.layer.0.attention.output.LayerNorm.weight": "norm",
        "encoder.layer.0.intermediate.dense.weight": "feed_forward",
        "encoder.layer.0.output.dense.weight": "feed_forward",
    },
}


NAMED["BERT"] |= {
    "bert.pooler.dense.weight": "head",
    "cls.predictions.decoder.weight": "head",
    "cls.predictions.transform.dense.weight": "head",
    "cls.predictions.transform.LayerNorm.weight": "norm",
    "cls.seq_relationship.bias": "head",
    "decoder.weight": "head",
    "classifier.weight": "head",
}
NAMED["DistilBERT"] = {
    "distilbert.transformer.layer.0.attention.q_lin.weight": "query_key",
    "distilbert.transformer.layer.0.attention.v_lin.bias": "value_output",
    "distilbert.transformer.layer.0.attention.out_lin.weight": "value_output",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "feed_forward",
    "pre_classifier.weight": "head",
}
NAMED["T5"] = {
    "shared.weight": "embedding",
    "decoder.block.0.layer.0.SelfAttention.q.weight": "query_key",
    "decoder.block.0.layer.1.EncDecAttention.o.weight": "value_output",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "feed_forward",
    "encoder.final_layer_norm.weight": "norm",
}
NAMED["GPT-2 and GPT-NeoX"] = {
    "transformer.h.0.attn.c_proj.weight": "value_output",
    "transformer.h.0.mlp.c_fc.weight": "feed_forward",
    "gpt_neox.layers.0.attention.dense.weight": "value_output",
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "feed_forward",
}
NAMED["torch"] = {
    "encoder.layers.0.linear1.weight": "feed_forward",
    "decoder.layers.0.linear2.bias": "feed_forward",
    "decoder.layers.0.multihead_attn.out_proj.weight": "value_output",
    "decoder.layers.0.norm3.weight": "norm",
    "attn.bias_k": "query_key",
    "attn.v_proj_weight": "value_output",
}


@pytest.mark.parametrize("library", NAMED)
def test_the_names_of_common_libraries_are_known(library: str) -> None:
    names = NAMED[library]
    found = {name: block for block, members in blocks_of(names).items() for name in members}
    assert found == names


@pytest.mark.parametrize(
    "name",
    [
        "h.0.attn.c_attn.weight",
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.qkv_proj.weight",
        "blocks.0.attn.qkv.weight",
        "layers.0.attention.query_key_value.weight",
    ],
)
def test_a_map_of_query_key_and_value_is_in_no_block(name: str) -> None:
    assert blocks_of([name, "norm.weight"]) == {"norm": ("norm.weight",)}


def test_the_first_block_that_matches_decides() -> None:
    names = ["a.weight", "a.bias", "b.bias"]
    assert blocks_of(names, {"levels": ["*.bias"], "all of a": ["a.*"]}) == {
        "all of a": ("a.weight",),
        "levels": ("a.bias", "b.bias"),
    }


def test_names_of_no_transformer_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"none of norm.* matches.*0\.weight, 0\.bias"):
        blocks_of(["0.weight", "0.bias"])


def test_coordinates_are_the_places_in_theta() -> None:
    layout = ParameterLayout(("a", "b", "c"), (torch.Size([2]), torch.Size([1, 2]), torch.Size([])))
    assert coordinates(layout, ["c", "a"]).tolist() == [0, 1, 4]
    with pytest.raises(InvalidInput, match=r"\['d'\], allowed: names of parameters in theta: a, b"):
        coordinates(layout, ["a", "d"])
    with pytest.raises(InvalidInput, match="names"):
        coordinates(layout, [])


@pytest.fixture
def matrix() -> torch.Tensor:
    drawn = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn + drawn.T


def test_a_restriction_multiplies_as_the_rows_and_columns_of_the_matrix(
    matrix: torch.Tensor,
) -> None:
    indices = torch.tensor([4, 0, 3])
    part = Restricted(DenseOperator(matrix), indices)
    block = matrix[indices][:, indices]
    vectors = torch.randn(3, 5, dtype=torch.float64)
    assert part.shape == (3, 3)
    torch.testing.assert_close(part @ vectors, block @ vectors)
    torch.testing.assert_close(part @ vectors[:, 0], block @ vectors[:, 0])
    found = eigenpairs(part, 3).eigenvalues
    torch.testing.assert_close(found.sort().values, torch.linalg.eigvalsh(block))


@pytest.mark.parametrize("indices", [[], [0, 0], [6], [-1, 2]])
def test_impossible_coordinates_are_refused(matrix: torch.Tensor, indices: list[int]) -> None:
    with pytest.raises(InvalidInput, match="at least one distinct integer from 0 to 5"):
        Restricted(DenseOperator(matrix), torch.tensor(indices, dtype=torch.int64))


def test_no_block_is_known_by_two_names() -> None:
    patterns = [pattern for block in TRANSFORMER_BLOCKS.values() for pattern in block]
    assert len(set(patterns)) == len(patterns)


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (
            "embedding",
            "transformer.wte.weight transformer.wpe.weight model.embed_tokens.weight cls_token"
            " pos_embed patch_embed.proj.weight class_token conv_proj.weight"
            " encoder.pos_embedding vit.embeddings.patch_embeddings.projection.weight",
        ),
        (
            "attention",
            "transformer.h.0.attn.c_attn.weight transformer.h.0.attn.c_proj.bias"
            " model.layers.0.self_attn.q_proj.weight model.layers.0.self_attn.o_proj.weight"
            " blocks.0.attn.qkv.weight blocks.0.attn.proj.bias"
            " encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
            " encoder.layers.encoder_layer_0.self_attention.out_proj.weight"
            " layers.0.self_attn.in_proj_weight bert.encoder.layer.0.attention.self.query.weight",
        ),
        (
            "feed_forward",
            "transformer.h.0.mlp.c_fc.weight transformer.h.0.mlp.c_proj.weight"
            " model.layers.0.mlp.gate_proj.weight blocks.0.mlp.fc1.weight"
            " layers.0.linear1.weight bert.encoder.layer.0.intermediate.dense.weight",
        ),
        (
            "norm",
            "transformer.h.0.ln_1.weight transformer.ln_f.bias model.norm.weight"
            " model.layers.0.post_attention_layernorm.weight blocks.0.norm1.weight bn1.weight"
            " layer1.0.bn2.bias layer2.0.downsample.1.weight bert.embeddings.LayerNorm.weight"
            " encoder.layers.encoder_layer_0.ln_1.weight",
        ),
        ("convolution", "conv1.weight layer1.0.conv2.weight layer2.0.downsample.0.weight"),
        (
            "head",
            "lm_head.weight fc.weight fc.bias head.weight heads.head.weight classifier.bias"
            " bert.pooler.dense.weight",
        ),
        ("other", "0.weight 2.bias rnn.weight_ih_l0"),
    ],
)
def test_each_parameter_of_common_models_is_in_its_block(block: str, names: str) -> None:
    assert list(blocks_of(names.split(), MODEL_BLOCKS)) == [block]
