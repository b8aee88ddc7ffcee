"""The vLLM engine against a server of ours: protocol, faults, and one run in which the server samples from the weights it is sent."""

import threading

import numpy as np
import pytest

pytest.importorskip("httpx")

from recipes.posttrain import Rollout
from tests.training.rl.factory import drive, prepare, rows
from tests.training.rl.vllm_double import VllmDouble
from training.rl.engine import Request
from training.rl.sampling import request_seed
from training.rl.vllm import ServerError, VllmClient

END = 0
REQUEST = Request((1, 2), 5, 3)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr("training.rl.vllm.FIRST_PAUSE_SECONDS", 0.001)
    server = VllmDouble()
    yield server
    server.close()


def client(double, **changes):
    server = {
        "url": double.url,
        "model": "policy",
        "weights_folder": "/unused",
        "attempts": 3,
        "timeout_seconds": 5.0,
    } | changes
    settings = Rollout.model_validate({"engine": "vllm", "max_response_tokens": 4, "temperature": 0.8, "server": server})
    return VllmClient(settings, seed=7, end_id=END)


def answer(**changes):
    choice = {"token_ids": [3, 4, 0], "logprobs": {"token_logprobs": [-0.5, -1.0, -0.1]}, "finish_reason": "stop"} | changes
    return {"choices": [choice]}


def test_what_is_sent_and_what_comes_back(double):
    double.answer = answer(prompt_token_ids=[1, 2])
    (done,) = client(double).complete([REQUEST])
    np.testing.assert_array_equal(done.ids, [3, 4, 0])
    np.testing.assert_allclose(done.logprobs, [-0.5, -1.0, -0.1])
    assert (done.ids.dtype, done.logprobs.dtype, done.truncated) == (np.int32, np.float32, False)
    (sent,) = double.bodies
    assert sent["prompt"] == [1, 2]
    assert (sent["max_tokens"], sent["temperature"], sent["model"]) == (4, 0.8, "policy")
    assert sent["seed"] == request_seed(7, 5, 3)
    # whatever the model folder's generation_config.json says
    assert (sent["top_p"], sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    double.answer = answer(token_ids=[1, 1, 1, 1], logprobs={"token_logprobs": [-1.0] * 4}, finish_reason="length")
    assert client(double).complete([REQUEST])[0].truncated


def test_order_is_kept_with_many_requests_in_flight(double):
    seen, together = threading.Semaphore(0), []

    def complete(body):
        together.append(threading.active_count())
        seen.release()
        n = body["prompt"][0]
        return answer(token_ids=[n, 0], logprobs={"token_logprobs": [-1.0, -1.0]})

    double.complete = complete
    requests = [Request((n,), n, 0) for n in range(1, 40)]
    done = client(double, concurrent_requests=8).complete(requests)
    assert [int(c.ids[0]) for c in done] == list(range(1, 40))


@pytest.mark.parametrize("fault", [(429, {}), (503, b"overloaded"), (500, {}), (200, b'{"choices": [{"tok')])
def test_faults_that_pass_are_waited_out(double, fault):
    double.answer = answer()
    double.faults["/v1/completions"].extend([fault, fault])
    assert client(double).complete([REQUEST])[0].ids.tolist() == [3, 4, 0]
    assert double.calls["/v1/completions"] == 3


@pytest.mark.parametrize(
    ("fault", "calls", "message"),
    [
        ((503, b"overloaded"), 3, "3 attempts failed, the last with HTTP 503: overloaded; is the server up"),
        ((400, {"message": "max_tokens is too large"}), 1, "HTTP 400: .*max_tokens is too large"),
        ((200, b"<html>"), 3, "no JSON"),
    ],
)
def test_faults_that_stay_end_the_stage(double, fault, calls, message):
    double.faults["/v1/completions"].extend([fault] * 5)
    with pytest.raises(ServerError, match=message):
        client(double).complete([REQUEST])
    assert double.calls["/v1/completions"] == calls


def test_an_unreachable_server(double):
    double.close()
    with pytest.raises(ServerError, match="ConnectError"):
        client(double).complete([REQUEST])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": None}, "token_ids must be"),
        ({"token_ids": []}, "token_ids must be"),
        ({"token_ids": [1] * 5}, "token_ids must be 1 to 4"),
        ({"token_ids": [1, "2", 0]}, "token_ids must be"),
        ({"logprobs": None}, "lacks"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "there must be 3 token_logprobs"),
        ({"logprobs": {"token_logprobs": [-1.0, None, -1.0]}}, "finite and not positive"),
        ({"logprobs": {"token_logprobs": [-1.0, 0.5, -1.0]}}, "finite and not positive"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
        ({"finish_reason": "length"}, "these contradict"),
        ({"token_ids": [3, 0, 4]}, "these contradict"),
        ({"token_ids": [3, 4, 5], "finish_reason": "length"}, "it was cut at 3 tokens, not at 4: raise the server's --max-model-len"),
        ({"prompt_token_ids": [9, 9]}, "prompt_token_ids are not those that were sent"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_trained_on_is_refused(double, changes, message):
    double.answer = answer(**changes)
    with pytest.raises(ServerError, match=message):
        client(double).complete([REQUEST])


def test_an_old_server_without_token_ids(double):
    double.answer = {"choices": [{"text": "x", "logprobs": None, "finish_reason": "stop"}]}
    with pytest.raises(ServerError, match=r"lacks 'token_ids'; .* \(vLLM 0.10.2 or newer\)"):
        client(double).complete([REQUEST])


def test_renewing_weights(double):
    client(double).renew()
    assert double.calls == {"/collective_rpc": 1, "/reset_prefix_cache": 1}
    double.development_mode = False
    with pytest.raises(ServerError, match="start vLLM with VLLM_SERVER_DEV_MODE=1"):
        client(double).renew()


@pytest.mark.multirank
def test_a_run_whose_rollouts_come_from_the_server(tmp_path):
    """Two steps on two pipeline stages. The gap of log-probabilities is small only if the server has each step's weights, exactly."""
    weights = tmp_path / "weights"
    double = VllmDouble(weights)
    try:
        stage = prepare(
            tmp_path / "stage",
            "pp2",
            steps=2,
            samples_per_prompt=2,
            learning_rate=2e-2,
            rollout={
                "engine": "vllm",
                "max_response_tokens": 4,
                "server": {
                    "url": double.url,
                    "model": "policy",
                    "weights_folder": str(weights),
                    "concurrent_requests": 4,
                    "timeout_seconds": 60.0,
                },
            },
        )
        assert drive(tmp_path / "log.txt", stage) == [0], (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        double.close()
    assert double.calls == {"/collective_rpc": 2, "/reset_prefix_cache": 2, "/v1/completions": 40}
    assert [row["step"] for row in rows(stage)] == [1, 2]
    # The second step's rollouts come from other weights than the first's: stale ones would show.
    assert all(0 < row["max_gap_nats"] < 1e-5 for row in rows(stage))
    assert rows(stage)[0]["grad_norm"] > 0.1
    assert not (stage / "rollout_weights").exists()
