import pytest
import torch
from transformers import MegatronBertConfig, MegatronBertModel

from shared.models.neighbour_heads import attend_to_neighbours

WIDTH, ROWS = 96, 48


@pytest.mark.parametrize("num_heads", [2, 3, 6])
def test_heads_of_a_new_model_attend_to_their_neighbour(num_heads: int) -> None:
    """Seen through the library's own attention weights; evenly spread they would be 0.02.

    Later blocks see less of the positions, since the outputs of earlier ones are as large as the embeddings.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": num_heads, "num_hidden_layers": 3, "intermediate_size": 64}
    model = MegatronBertModel(MegatronBertConfig(vocab_size=50, max_position_embeddings=ROWS, **sizes)).eval()
    heads = [layer.attention.self for layer in model.encoder.layer]
    blocks = [(head.query.weight, head.key.weight) for head in heads]
    attend_to_neighbours(model.embeddings.position_embeddings.weight, blocks, num_heads, token_std=0.02, seed=1)
    ids = torch.randint(50, (4, ROWS))
    attentions = model(input_ids=ids, output_attentions=True).attentions  # of each block (4, heads, ROWS, ROWS)
    even = 1 / ROWS
    for number, attention in enumerate(attentions):
        for head in range(num_heads):
            shares = {
                distance: attention[:, head].diagonal(distance, dim1=1, dim2=2).mean() for distance in (-1, 1, -2, 2)
            }
            if head < 2 * num_heads // 3:
                own = shares.pop([-1, 1, -2, 2][head])
                assert own > (15 if number == 0 else 3) * even
            assert all(share < 1.3 * even for share in shares.values())


def test_the_rest_of_the_weights_stays() -> None:
    query, key = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    free = query[64:].clone(), key[64:].clone()
    attend_to_neighbours(torch.empty(ROWS, WIDTH), [(query, key)], num_heads=3, token_std=0.02, seed=1)
    assert torch.equal(query[64:], free[0])
    assert torch.equal(key[64:], free[1])


def test_distant_positions_do_not_look_alike() -> None:
    table = torch.empty(512, 768)
    attend_to_neighbours(table, [], num_heads=12, token_std=0.02, seed=0)
    likeness = torch.nn.functional.normalize(table) @ torch.nn.functional.normalize(table).T
    assert likeness.fill_diagonal_(0).max() < 0.6
