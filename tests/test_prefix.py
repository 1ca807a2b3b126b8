"""The shared-prefix pass equals separate sequences, in values and gradients; losses by hand; pitfalls 10, 13, 16, 17."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from suasion.errors import UserError
from suasion.training.losses import (
    effective_logprobs,
    logprob_rounding,
    loss_rounding,
    preference_loss,
    soft_loss,
    zero_margin_loss,
)
from suasion.training.prefix import pack, reply_logits, sum_by_reply, sum_logprobs, token_kl, within

ids = st.lists(st.integers(0, 49), min_size=1, max_size=9)
groups = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=3)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        attn_implementation="sdpa", initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for module in model.modules():
        if module.__class__.__name__ == "LlamaRMSNorm":  # the library's computes in fp32 whatever the weights are
            module.forward = lambda x, m=module: m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
    return model


MODEL = small_model()


def plain_logprob(model, prompt, reply):
    """The textbook computation: one sequence, full logits."""
    sequence = torch.tensor([[*prompt, *reply]])
    logits = model(input_ids=sequence).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(reply))


def shared(model, packed):
    logits = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=packed.attention_mask,
        logits_to_keep=packed.predict_at,
        use_cache=False,
    ).logits[0]
    return sum_logprobs(logits, packed)


@settings(max_examples=40, deadline=None)
@given(groups)
def test_shared_prefix_equals_separate_sequences_in_float64(parts):
    ours = shared(MODEL, pack(parts))
    theirs = torch.stack([plain_logprob(MODEL, prompt, reply) for prompt, replies in parts for reply in replies])
    assert (ours - theirs).abs().max() < 1e-9


def test_gradients_flow_through_the_shared_prompt_exactly():
    parts = [([1, 2, 3, 4], [[5, 6, 7], [8, 9]]), ([10, 11], [[12], [13, 14, 15, 16]])]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    gradients = []
    for ours in (True, False):
        MODEL.zero_grad()
        values = (
            shared(MODEL, pack(parts))
            if ours
            else torch.stack([plain_logprob(MODEL, p, r) for p, replies in parts for r in replies])
        )
        (values * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in MODEL.named_parameters()})
    for name in gradients[0]:
        assert (gradients[0][name] - gradients[1][name]).abs().max() < 1e-9, name


def test_replies_cannot_see_each_other_or_another_pair():
    base = shared(MODEL, pack([([1, 2], [[3, 4], [5, 6]]), ([7], [[8], [9]])]))
    changed = shared(MODEL, pack([([1, 2], [[3, 4], [40, 41]]), ([7], [[8], [42]])]))
    assert torch.equal(base[[0, 2]], changed[[0, 2]])
    assert (base[[1, 3]] != changed[[1, 3]]).all()


@pytest.mark.parametrize("bad", [[([], [[1]])], [([1], [[]])]])
def test_nothing_to_score_is_an_error(bad):
    with pytest.raises(ValueError, match="without tokens"):
        pack(bad)


def test_logits_are_computed_in_fp32_and_only_where_needed():
    packed = pack([([1, 2, 3], [[4, 5], [6]])])
    model = LlamaForCausalLM(MODEL.config).to(torch.bfloat16).eval()
    logits = reply_logits(model, packed)
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 50)


def test_log_probabilities_are_sums():
    logits = torch.zeros(5, 7)
    packed = pack([([1], [[1, 2, 3], [4, 5]])])
    assert torch.allclose(sum_logprobs(logits, packed), torch.tensor([-3 * math.log(7), -2 * math.log(7)]))


def test_kl_of_equal_distributions_is_zero_and_else_as_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert token_kl(p.log(), p.log()).item() == pytest.approx(0, abs=1e-7)
    assert token_kl(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), abs=1e-6)


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.2), ("length-normalised", 0.0)])
def test_zero_margin_value(loss, smoothing):
    assert preference_loss(torch.zeros(3), loss, 0.1, smoothing).tolist() == pytest.approx(
        [zero_margin_loss(loss, 0.1)] * 3, rel=1e-6
    )


@pytest.mark.parametrize("p", [1.0, 0.7])
@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.3), ("length-normalised", 0.0)])
def test_a_first_loss_may_differ_as_far_as_rounding_moves_its_margin(loss, smoothing, p):
    """Whatever the margin is: with another reference than the start it is not zero, and IPO is flat where the loss is least."""
    beta, lengths, targets = 0.1, torch.tensor([[120.0, 80.0]]), torch.tensor([p], dtype=torch.float64)
    terms = 1 / lengths if loss == "length-normalised" else lengths
    rounding = logprob_rounding(terms.sum(1), "bfloat16").double()
    for h in (-40.0, -5.0, 0.0, 5.0, 40.0):  # 5 is where IPO is least
        margins = torch.tensor([h], dtype=torch.float64)
        expected = soft_loss(margins, targets, loss, beta, smoothing)
        moved = max(
            (soft_loss(margins + d, targets, loss, beta, smoothing) - expected).abs().item() for d in (rounding, -rounding)
        )
        allowed = loss_rounding(lengths, "bfloat16", loss, beta, expected, smoothing).item()
        assert moved <= allowed * (1 + 1e-6)
        if h == 0:
            assert allowed <= 6 * moved  # and no more than that order


def test_losses_by_hand():
    h, beta = 2.0, 0.5
    margins = torch.tensor([h], dtype=torch.float64)
    sigmoid = math.log(1 + math.exp(-beta * h))
    flipped = math.log(1 + math.exp(beta * h))
    assert preference_loss(margins, "sigmoid", beta).item() == pytest.approx(sigmoid)
    assert preference_loss(margins, "ipo", beta).item() == pytest.approx((h - 1.0) ** 2)
    assert preference_loss(margins, "robust", beta, 0.1).item() == pytest.approx((0.9 * sigmoid - 0.1 * flipped) / 0.8)
    # A label flipped with probability e gives the clean loss in expectation: that is what "robust" means.
    both = 0.9 * preference_loss(margins, "robust", beta, 0.1) + 0.1 * preference_loss(-margins, "robust", beta, 0.1)
    assert both.item() == pytest.approx(sigmoid)


def test_effective_logprobs_by_hand():
    sums, heads, lengths = torch.tensor([[-12.0, -5.0]]), torch.tensor([[-7.0, -5.0]]), torch.tensor([[4.0, 2.0]])
    assert effective_logprobs(sums, heads, lengths, "sigmoid").tolist() == [[-12.0, -5.0]]
    assert effective_logprobs(sums, heads, lengths, "length-normalised").tolist() == [[-3.0, -2.5]]
    assert effective_logprobs(sums, heads, lengths, "length-desensitised", 0.4).tolist() == [[pytest.approx(-9.0), -5.0]]
    assert torch.equal(effective_logprobs(sums, heads, lengths, "length-desensitised", 1.0), sums)
    assert torch.equal(effective_logprobs(sums, heads, lengths, "length-desensitised", 0.0), heads)


def test_soft_labels_by_hand():
    margins = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    right, wrong = (preference_loss(torch.tensor([h], dtype=torch.float64), "sigmoid", 0.5).item() for h in (2.0, -2.0))
    soft = soft_loss(margins, torch.tensor([1.0, 0.7, 0.5], dtype=torch.float64), "sigmoid", 0.5)
    assert soft.tolist() == pytest.approx([right, 0.7 * right + 0.3 * wrong, 0.5 * (right + wrong)])
    # The soft loss is least where the model is as sure as the label: sigmoid(beta h) = p.
    at = torch.linspace(-5, 8, 2001, dtype=torch.float64)
    best = at[soft_loss(at, torch.full_like(at, 0.7), "sigmoid", 0.5).argmin()]
    assert torch.sigmoid(0.5 * best).item() == pytest.approx(0.7, abs=2e-3)


def test_heads_of_replies():
    packed = pack([([1], [[1, 2, 3], [4, 5]]), ([2], [[6]])])
    assert within(packed, torch.tensor([2, 2, 0])).tolist() == [True, True, False, True, True, False]
    assert sum_by_reply(torch.arange(1.0, 7.0), packed).tolist() == [6.0, 9.0, 6.0]
    assert packed.ends.tolist() == [3, 5, 7]
    assert packed.input_ids[0, packed.ends].tolist() == [3, 5, 6]


@settings(max_examples=30, deadline=None)
@given(groups)
def test_the_mask_lets_a_token_see_its_prompt_and_its_own_reply(parts):
    """Against the definition, token by token; the block mask of FlexAttention says the same."""
    packed = pack(parts)
    owners = [
        (group, branch)
        for group, (prompt, replies) in enumerate(parts)
        for branch, part in enumerate([prompt, *replies])
        for _ in part
    ]
    expected = [
        [q >= k and owners[q][0] == owners[k][0] and owners[k][1] in (0, owners[q][1]) for k in range(len(owners))]
        for q in range(len(owners))
    ]
    assert packed.attention_mask[0, 0].tolist() == expected
    blocks = packed.block_mask()
    size = torch.arange(len(owners))
    assert blocks.mask_mod(0, 0, size[:, None], size[None, :]).tolist() == expected


def test_eager_attention_gives_the_same_logprobs():
    """It adds its mask to the scores: a mask of True and False would hide nothing."""
    packed = pack([([1, 2, 3, 4], [[5, 6, 7], [8, 9]]), ([10, 11], [[12], [13, 14, 15, 16]])])
    model = LlamaForCausalLM(MODEL.config).eval()
    found = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(sum_logprobs(reply_logits(model, packed), packed))
    model.set_attn_implementation("sdpa")
    assert (found[0] - found[1]).abs().max() < 1e-4


def windowed(kind: str):
    """A model whose layers see a window, all of them or every other one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    if kind == "every other":
        layers = ["sliding_attention", "full_attention"] * 2
        return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_hidden_layers=4, sliding_window=5, layer_types=layers)).eval()
    return MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, sliding_window=5)).eval()


@pytest.mark.parametrize("kind", ["every other", "all"])
def test_layers_with_a_window_see_no_further_than_without_packing(kind):
    """A mask that is given whole is taken as it is: without the window in it, training would see more than sampling does."""
    model = windowed(kind)
    parts = [(list(range(1, 15)), [list(range(20, 32)), [5, 6]]), ([7, 8], [[9], list(range(30, 45))])]
    packed = pack(parts)
    with torch.no_grad():
        ours = sum_logprobs(reply_logits(model, packed), packed)
        theirs = torch.stack([plain_logprob(model, prompt, reply) for prompt, replies in parts for reply in replies])
        model.config.sliding_window = 1000
        unwindowed = sum_logprobs(reply_logits(model, packed), packed)
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - unwindowed).abs().max() > 1e-2  # or nothing was tested


def test_layers_that_no_mask_keeps_apart_are_refused():
    """A layer with a state that runs through the row would carry one pair into the next."""
    packed = pack([([1], [[2]])])
    model = windowed("every other")
    model.config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(UserError, match="layers of kind linear_attention"):
        packed.mask_for(model)


def test_flex_attention_gives_the_same_logprobs():
    """Forward only: torch has no backward of it off the GPU."""
    parts = [([1, 2, 3, 4], [[5, 6, 7], [8, 9]]), ([10, 11], [[12], [13, 14, 15, 16]])]
    model = LlamaForCausalLM(MODEL.config).eval()
    packed = pack(parts)
    with torch.no_grad():
        plain = sum_logprobs(reply_logits(model, packed), packed)
        model.set_attn_implementation("flex_attention")
        assert isinstance(packed.mask_for(model), BlockMask)
        flexible = sum_logprobs(reply_logits(model, packed), packed)
    model.set_attn_implementation("sdpa")
    assert (plain - flexible).abs().max() < 1e-4
