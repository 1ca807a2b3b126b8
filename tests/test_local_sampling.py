"""The local engine against the model itself: greedy, distribution, random numbers, stop, batches; pitfalls 2, 20, 21."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, gumbel_r
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from suasion.few_rows import FewRowsLinear
from suasion.models import Compute, Lineage, load_merged, load_policy, load_to_sample, prepare_to_decode, save_adapter
from suasion.sampling import local
from suasion.sampling.cache import ReservedLayer, closing_moves, keep_rows, reserve
from suasion.sampling.draws import Draw
from suasion.sampling.local import choose, decode, penalise, plan_batches
from suasion.sampling.noise import gumbel
from suasion.sampling.respond import Journal, at_limit, flags, longest_copy, repeated_share
from suasion.sections.sampling import SampleSection
from suasion.sections.training import LoraSection
from suasion.seeding import derive_seed
from suasion.training.losses import LOGPROB_TOLERANCE

CPU = Compute("cpu", "float32", 2)


@pytest.fixture(scope="module")
def model(tiny):
    return load_merged(Lineage(tiny))


def draws(count=6, responses=1):
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(10, 1900, size=4 + 5 * i).tolist()) for i in range(count)]
    return [Draw(f"p{i}", prompt, n) for i, prompt in enumerate(prompts) for n in range(responses)]


def test_batched_greedy_equals_one_by_one(model):
    settings = SampleSection(temperature=0, max_new_tokens=12)
    together = decode(model, draws(), settings, 0, stop_id=-1, pad_id=2, hardware=CPU)
    for drawn in together:
        ids = torch.tensor([drawn.draw.prompt])
        reference = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=2
        )
        assert drawn.tokens == tuple(reference[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_batch_size_and_order_change_no_token(model, size):
    settings = SampleSection(temperature=1.0, top_p=0.95, max_new_tokens=8)
    wanted = {(d.draw.prompt_id, d.draw.n): d for d in decode(model, draws(6, 2), settings, 5, -1, 2, CPU)}
    for batch in plan_batches(draws(6, 2)[::-1], size):
        for drawn in decode(model, batch, settings, 5, -1, 2, CPU):
            other = wanted[drawn.draw.prompt_id, drawn.draw.n]
            assert drawn.tokens == other.tokens
            assert drawn.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_stored_logprob_is_that_of_a_scoring_pass(model):
    settings = SampleSection(temperature=0.5, top_p=0.8, max_new_tokens=6)
    for drawn in decode(model, draws(3, 2), settings, 1, -1, 2, CPU):
        logits = model(torch.tensor([[*drawn.draw.prompt, *drawn.tokens]])).logits[0].log_softmax(-1)
        start = len(drawn.draw.prompt) - 1
        expected = sum(logits[start + i, token].item() for i, token in enumerate(drawn.tokens))
        assert drawn.logprob == pytest.approx(expected, abs=1e-3)


def test_a_row_stops_at_the_stop_token_while_others_go_on(model):
    settings = SampleSection(temperature=0, max_new_tokens=10)
    free = decode(model, draws(4), settings, 0, -1, 2, CPU)
    stop = free[1].tokens[3]
    stopped = decode(model, draws(4), settings, 0, stop, 2, CPU)
    for drawn, reference in zip(stopped, free, strict=True):
        end = reference.tokens.index(stop) + 1 if stop in reference.tokens else 10
        assert drawn.tokens == reference.tokens[:end]
        assert drawn.finish == ("stop" if stop in reference.tokens else "length")


def test_prompts_are_read_once_and_finished_rows_leave(model):
    """The model computes one row a prompt first, and then those rows alone that have not ended."""
    settings = SampleSection(temperature=1.0, top_p=1.0, max_new_tokens=10)
    stop = decode(model, draws(4, 3), settings, 0, -1, 2, CPU)[1].tokens[3]
    watched = Watched(model)
    said = [len(drawn.tokens) for drawn in decode(watched, draws(4, 3), settings, 0, stop, 2, CPU)]
    assert min(said) < 10
    assert watched.shapes[0] == (4, max(len(draw.prompt) for draw in draws(4, 3)))
    assert watched.shapes[1:] == [(sum(length > step for length in said), 1) for step in range(1, max(said))]


class Watched:
    """The model, with the shape of what it was given at each call."""

    def __init__(self, model):
        self.model, self.device, self.config, self.shapes = model, model.device, model.config, []

    def __call__(self, **inputs):
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return self.model(**inputs)


def test_two_responses_of_a_prompt_differ_and_repeat_exactly(model):
    settings = SampleSection(temperature=1.0, top_p=1.0, max_new_tokens=8)
    first = decode(model, draws(2, 2), settings, 9, -1, 2, CPU)
    assert first == decode(model, draws(2, 2), settings, 9, -1, 2, CPU)
    assert first[0].tokens != first[1].tokens
    assert first[0].tokens != decode(model, draws(2, 2), settings, 10, -1, 2, CPU)[0].tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_is_a_loop_of_whole_passes(model, dtype):
    """Against the slowest way there is: every token from a pass over prompt and response, one row, no cache, weights as they are.

    The tiny model is nearly flat, so that in bf16 greedy choices of the two ways may differ: the response's own tokens are scored.
    """
    hardware = Compute("cpu", dtype, 1)
    settings = SampleSection(temperature=0, max_new_tokens=10)
    rounded = prepare_to_decode(copy.deepcopy(model), hardware)
    for drawn in decode(rounded, draws(5, 2), settings, 0, stop_id=-1, pad_id=2, hardware=hardware):
        ids, score = list(drawn.draw.prompt), 0.0
        for token in drawn.tokens:
            with torch.no_grad(), hardware.autocast():
                logits = model(torch.tensor([ids])).logits[0, -1].float()
            if dtype == "float32":
                assert token == int(logits.argmax())
            score += float(logits.log_softmax(0)[token])
            ids.append(token)
        assert drawn.logprob == pytest.approx(score, abs=LOGPROB_TOLERANCE[dtype] * len(drawn.tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_what_samples_is_what_was_trained(adapters, dtype, tiny, tmp_path):
    """Bit by bit in bf16, where the newest adapter stays beside weights that are rounded once; to rounding in fp32, where it is folded in."""
    hardware = Compute("cpu", dtype, 1)
    lora = LoraSection(r=8, alpha=32, dropout=0.1, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    lineage = Lineage(tiny)
    for number in range(adapters):
        policy = load_policy(lineage, lora, number)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.5)
        save_adapter(policy, tmp_path / str(number), tiny)
        lineage = lineage.extended(tmp_path / str(number))
    policy.eval()
    sampled = load_to_sample(lineage, hardware)
    ids = torch.tensor([draws(6)[-1].prompt])
    with torch.no_grad(), hardware.autocast():
        trained, got = policy(ids).logits, sampled(ids).logits
        with policy.disable_adapter():
            start = policy(ids).logits
    assert (trained - start).abs().max() > 0.05  # the adapter does something
    if dtype == "bfloat16":
        assert torch.equal(trained, got)
        assert sampled.lm_head.weight.dtype == sampled.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
        assert sampled.get_input_embeddings().weight.dtype == torch.float32
    else:
        torch.testing.assert_close(trained, got, atol=1e-4, rtol=1e-3)
        assert not any("lora" in name for name, _ in sampled.named_modules())


@given(st.integers(1, 12).flatmap(lambda rows: st.tuples(st.just(rows), st.sets(st.integers(0, rows - 1), min_size=1))))
def test_rows_that_finish_leave_no_gap_and_move_few(case):
    rows, keep = case
    order, sources, targets = closing_moves(rows, sorted(keep))
    assert sorted(order) == sorted(keep)  # each that stays, once
    places = list(range(rows))
    for source, target in zip(sources, targets, strict=True):
        places[target] = places[source]
    assert places[: len(order)] == order  # the moves do what the order says
    assert len(sources) <= rows - len(keep)


def test_a_cache_with_room_holds_what_a_growing_one_holds():
    generator = torch.Generator().manual_seed(0)
    growing = DynamicCache()
    growing.update(*(torch.randn(2, 3, 4, 8, generator=generator) for _ in range(2)), 0)
    roomy = copy.deepcopy(growing)
    source = torch.tensor([0, 0, 1, 1])
    growing.batch_select_indices(source)
    roomy = reserve([roomy], source, 4, 3, None)
    assert isinstance(roomy.layers[0], ReservedLayer)
    for keep in ([0, 1, 2, 3], [1, 3], [0]):
        order, sources, targets = closing_moves(growing.layers[0].keys.shape[0], keep)
        growing.batch_select_indices(torch.tensor(order))
        keep_rows(roomy, torch.tensor(order), torch.tensor(sources).long(), torch.tensor(targets).long())
        new = [torch.randn(len(keep), 3, 1, 8, generator=generator) for _ in range(2)]
        for mine, theirs in zip(roomy.update(*new, 0), growing.update(*new, 0), strict=True):
            assert torch.equal(mine, theirs)
        assert roomy.get_seq_length() == growing.get_seq_length()
        assert roomy.get_mask_sizes(1, 0) == growing.get_mask_sizes(1, 0)


def test_caches_of_several_passes_become_one():
    """Two passes over prompts of 5 and 3 positions, rows in any order: each row is its prompt, at the right end, with numbers before it."""
    parts = []
    for rows, length in ((2, 5), (3, 3)):
        parts.append(DynamicCache())
        parts[-1].update(torch.randn(rows, 3, length, 8), torch.randn(rows, 3, length, 8), 0)
    filled = [(part.layers[0].keys.clone(), part.layers[0].values.clone()) for part in parts]
    source = [4, 0, 1, 1, 2]
    cache = reserve(parts, torch.tensor(source), 5, 2, None)
    assert parts[1].layers[0].keys is None  # free
    for row, prompt in enumerate(source):
        for held, (first, second) in zip((cache.layers[0].keys, cache.layers[0].values), zip(*filled, strict=True), strict=True):
            wanted = first[prompt] if prompt < 2 else second[prompt - 2]
            assert torch.equal(held[row, :, 5 - wanted.shape[1] :], wanted)
            assert not held[row, :, : 5 - wanted.shape[1]].any()


def test_prompts_read_in_several_passes_are_answered_as_in_one(model, monkeypatch):
    settings = SampleSection(temperature=1.0, top_p=0.95, max_new_tokens=8)
    cut = []
    for most in (10**6, 40):
        monkeypatch.setattr(local, "READ_TOKENS", most)
        cut.append(decode(model, draws(8, 2), settings, 4, -1, 2, CPU))
    assert len(local.passes(sorted((len(draw.prompt) for draw in draws(8)), reverse=True), 40)) > 2
    for one, other in zip(*cut, strict=True):
        assert one.tokens == other.tokens
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 5, 96, 97])
@pytest.mark.parametrize("bias", [True, False])
def test_products_for_few_rows_are_the_layers(rows, bias):
    torch.manual_seed(rows)
    layer = torch.nn.Linear(24, 40, bias=bias)
    few = FewRowsLinear(layer)
    for shape in ((rows, 24), (rows, 1, 24)):
        value = torch.randn(shape)
        torch.testing.assert_close(few(value), layer(value))
        assert few(value).is_contiguous()
    assert few.weight is layer.weight


def test_only_decoding_in_fp32_on_a_processor_gets_them(model):
    def kinds(dtype):
        prepared = prepare_to_decode(copy.deepcopy(model), Compute("cpu", dtype, 1))
        return {type(module) for module in prepared.modules() if isinstance(module, torch.nn.Linear)}, prepared

    found, prepared = kinds("float32")
    assert found == {FewRowsLinear if torch.backends.mkl.is_available() else torch.nn.Linear}
    assert prepared.lm_head.weight is prepared.get_input_embeddings().weight  # tied, as before
    assert kinds("bfloat16")[0] == {torch.nn.Linear}


def test_models_with_sliding_windows_are_decoded_too():
    """Their windowed layers stay the library's; the token choice equals one-by-one decoding with `generate`."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    batch = [Draw(f"p{i}", tuple(range(20 + i, 30 + 4 * i)), n) for i in range(4) for n in (0, 1)]
    for drawn in decode(model, batch, SampleSection(temperature=0, max_new_tokens=12), 0, -1, 0, CPU):
        ids = torch.tensor([drawn.draw.prompt])
        reference = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
        assert drawn.tokens == tuple(reference[0, ids.shape[1] :].tolist())


def test_only_rows_that_need_it_look_at_every_token(monkeypatch):
    sizes = []
    look = local._choose_among
    monkeypatch.setattr(
        local, "_choose_among", lambda logits, *rest: sizes.append((len(logits), rest[-1])) or look(logits, *rest)
    )
    logits = torch.zeros(6, 3000)
    logits[:4, 7] = 20.0
    seeds = np.arange(6, dtype=np.uint64)
    chosen = choose(logits, seeds, 0, 1.0, 0.9)
    assert chosen[:4].tolist() == [7] * 4
    assert sizes == [(6, 256), (2, 3000)]
    monkeypatch.setattr(local, "CANDIDATES", 3000)
    assert chosen.tolist() == choose(logits, seeds, 0, 1.0, 0.9).tolist()


def many(logits, count, **settings):
    seeds = np.array([derive_seed(1, "test", i) for i in range(count)], dtype=np.uint64)
    return choose(torch.as_tensor(logits).expand(count, -1), seeds, 3, **settings).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_follow_the_models_distribution(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    expected = (logits.double() / temperature).softmax(0).numpy() * 20000
    assert chisquare(np.bincount(many(logits, 20000, temperature=temperature, top_p=1.0), minlength=5), expected).pvalue > 1e-3


def test_truncated_tokens_follow_the_renormalised_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    expected = logits.double().softmax(0).numpy()[:3]
    counts = np.bincount(many(logits, 20000, temperature=1.0, top_p=0.9), minlength=5)
    assert counts[3:].sum() == 0
    assert chisquare(counts[:3], expected / expected.sum() * 20000).pvalue > 1e-3


@pytest.mark.parametrize(("top_p", "allowed"), [(0.4, {0}), (0.49, {0}), (0.7, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_is_the_smallest_set_that_reaches_it(top_p, allowed):
    assert set(many(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 500, temperature=1.0, top_p=top_p).tolist()) == allowed


def test_top_k_keeps_the_k_most_likely():
    assert set(many(torch.tensor([0.1, 0.5, 0.3, 0.1]).log(), 500, temperature=1.0, top_p=1.0, top_k=2).tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("min_p", "allowed"), [(0.0, {0, 1, 2, 3}), (0.09, {0, 1, 2, 3}), (0.11, {0, 1, 2}), (0.5, {0, 1}), (0.7, {0})]
)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(min_p, allowed):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(many(logits, 800, temperature=1.0, top_p=1.0, min_p=min_p).tolist()) == allowed


def test_min_p_follows_the_renormalised_distribution_and_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    probabilities = (logits.double() / 2).softmax(0).numpy()
    kept = probabilities >= 0.3 * probabilities[0]
    assert kept.tolist() == [True, True, True, False, False]
    counts = np.bincount(many(logits, 20000, temperature=2.0, top_p=1.0, min_p=0.3), minlength=5)
    assert counts[3:].sum() == 0
    expected = probabilities[:3] / probabilities[:3].sum() * 20000
    assert chisquare(counts[:3], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings", [{"min_p": 0.5}, {"top_p": 0.9, "min_p": 0.01}, {"top_p": 0.9}, {"top_p": 0.3, "min_p": 0.9}]
)
def test_looking_at_few_candidates_first_changes_no_token(settings, monkeypatch):
    settings = {"temperature": 1.0, "top_p": 1.0, **settings}
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 4, 64)[:, None]
    seeds = np.array([derive_seed(1, "test", i) for i in range(64)], dtype=np.uint64)
    quick = choose(logits, seeds, 0, **settings)
    monkeypatch.setattr(local, "CANDIDATES", 3000)
    assert quick.tolist() == choose(logits, seeds, 0, **settings).tolist()


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.04}, {"temperature": 0.9, "top_p": 0.9, "min_p": 0.03}]
)
def test_decoded_tokens_follow_the_models_own_distribution(model, settings):
    """End to end: the first token of 3,000 responses to one prompt against the model's truncated probabilities (chi-squared)."""
    section = SampleSection(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, **settings})
    prompt = tuple(range(20, 40))
    with torch.no_grad():
        # The tiny model is nearly flat: sharpened, so that truncation has something to cut.
        logits = model(torch.tensor([prompt])).logits[0, -1].double() * 8
    model_logits = SharpenedModel(model, 8)
    drawn = [
        d.tokens[0]
        for start in range(0, 3000, 500)
        for d in decode(model_logits, [Draw("p", prompt, start + n) for n in range(500)], section, 3, -1, 2, CPU)
    ]
    probabilities = (logits / section.temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    kept = torch.zeros_like(probabilities, dtype=torch.bool)
    kept[order[: section.top_k] if section.top_k else order] = True
    sorted_probabilities = probabilities[order]
    kept[order[sorted_probabilities.cumsum(0) - sorted_probabilities >= section.top_p]] = False
    kept &= probabilities >= section.min_p * probabilities.max()
    expected = torch.where(kept, probabilities, 0.0)
    expected = (expected / expected.sum()).numpy() * 3000
    counts = np.bincount(drawn, minlength=len(expected))
    assert counts[~kept.numpy()].sum() == 0
    common = expected >= 5
    pooled = [*expected[common], expected[~common].sum()]
    seen = [*counts[common], counts[~common].sum()]
    if pooled[-1] < 5:
        pooled, seen = [*pooled[:-2], pooled[-2] + pooled[-1]], [*seen[:-2], seen[-2] + seen[-1]]
    assert len(pooled) >= 5
    assert chisquare(seen, np.array(pooled) * sum(seen) / sum(pooled)).pvalue > 1e-3


class SharpenedModel:
    """The model with its logits multiplied."""

    def __init__(self, model, factor):
        self.model, self.factor, self.device, self.config = model, factor, model.device, model.config

    def __call__(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits * self.factor
        return output


def test_a_flat_distribution_falls_back_to_the_full_sort():
    assert len(set(many(torch.zeros(3000), 400, temperature=1.0, top_p=0.9).tolist())) > 350


def test_noise_belongs_to_the_token_not_to_its_place():
    seeds = np.array([5, 6], dtype=np.uint64)
    straight = gumbel(seeds, 2, torch.tensor([[1, 2, 3], [1, 2, 3]]))
    moved = gumbel(seeds, 2, torch.tensor([[3, 1], [2, 3]]))
    assert moved.tolist() == [[straight[0, 2], straight[0, 0]], [straight[1, 1], straight[1, 2]]]
    assert not np.intersect1d(straight, gumbel(seeds, 3, torch.tensor([[1, 2, 3], [1, 2, 3]]))).size


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**20))
def test_noise_is_the_published_hash_on_whole_numbers(seed, position, token):
    """SplitMix64's finaliser in Python's own integers, and the library's Gumbel distribution."""

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    bits = mixed((mixed((seed + (position + 1) * golden) % 2**64) + (token + 1) * golden) % 2**64)
    expected = gumbel_r.ppf(((bits >> 11) + 0.5) * 2.0**-53)
    for many in (position, np.array([position])):
        noise = gumbel(np.array([seed], dtype=np.uint64), many, torch.tensor([[token]]))
        assert noise.dtype == torch.float64
        assert noise.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_penalty_lowers_tokens_already_said_in_their_row_only():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    assert penalise([[0, 1], []], logits, 2.0).tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]


def test_flags():
    assert flags("A clear answer.", "stop", "something else") == ()
    assert flags("", "stop", "x") == ("empty",)
    assert flags("and so on and so on and so on and so on and so on", "length", "x") == ("cut-off", "looping")
    context = " ".join(f"w{i}" for i in range(40))
    assert flags("I say " + " ".join(f"w{i}" for i in range(25)), "stop", context) == ("copying",)
    assert not longest_copy("w1 w2 w3", context, 20)
    assert repeated_share("a b c d e f") == 0.0


def test_a_torn_journal_loses_only_the_torn_batch(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add("one", [{"x": 1}])
    journal.add("two", [{"x": 2}])
    for cut in range(1, 12):
        torn = tmp_path / f"torn{cut}.jsonl"
        torn.write_bytes(path.read_bytes()[:-cut])
        assert Journal(torn).done == {"one": [{"x": 1}]}
        again = Journal(torn)
        again.add("two", [{"x": 2}])
        assert Journal(torn).done == journal.done


def test_the_share_at_the_limit_is_of_first_draws(tmp_path):
    """Drawing cut-off responses again hides how often the model does not stop."""
    journal = Journal(tmp_path / "journal.jsonl")

    def row(n, finish):
        text = {"id": f"{n}{finish}", "prompt_id": "p", "n": n, "text": "x", "finish": finish, "lineage": "l", "seed": 0}
        return {"format": "response/1", "flags": [], "tokens": [1], "logprob": -1.0, **text}

    journal.add("sample/l/0/0", [row(0, "length"), row(1, "stop")])
    journal.add("sample/l/0/1", [row(2, "length"), row(3, "length")])
    journal.add("sample/l/1/0", [row(0, "stop"), row(2, "stop"), row(3, "length")])
    journal.add("responses of sft/l/0/0", [row(0, "stop")])
    assert at_limit(journal.first_draws("sample")) == 0.75
    assert at_limit(Journal(journal.path).first_draws("sample")) == 0.75
    assert at_limit([]) == 0
