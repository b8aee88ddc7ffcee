"""A server that speaks the part of vLLM's protocol that Quarry uses, and really samples: from the weights in its folder, by transformers.

Faults can be put in its way: `faults` maps a path to answers that are given first, (status, body) each.
"""

import json
import threading
from collections import Counter, defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class VllmDouble:
    def __init__(self, folder=None, development_mode=True):
        self.folder = folder
        self.development_mode = development_mode
        self.model = None
        self.calls = Counter()
        self.bodies = []
        self.faults = defaultdict(deque)
        self.answer = None
        """Given in the place of a sampled completion."""
        self._lock = threading.Lock()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with double._lock:
                    double.calls[self.path] += 1
                    fault = double.faults[self.path].popleft() if double.faults[self.path] else None
                    status, body = fault or double.handle(self.path, json.loads(raw))
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def handle(self, path, body):
        if path == "/collective_rpc":
            if not self.development_mode:
                return 404, {"detail": "Not Found"}
            assert body["method"] == "reload_weights"
            if self.folder is not None:
                from transformers import AutoModelForCausalLM

                self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, b""
        assert path == "/v1/completions"
        self.bodies.append(body)
        return 200, self.answer or self.complete(body)

    @torch.no_grad()
    def complete(self, body):
        generator = torch.Generator().manual_seed(body["seed"] % 2**63)
        ids, sampled, logprobs = list(body["prompt"]), [], []
        reason = "length"
        while len(sampled) < body["max_tokens"]:
            logits = self.model(torch.tensor([ids + sampled])).logits[0, -1] / body["temperature"]
            logprob = logits.log_softmax(-1)
            token = int(torch.multinomial(logprob.exp(), 1, generator=generator))
            sampled.append(token)
            logprobs.append(float(logprob[token]))
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        choice = {
            "index": 0,
            "token_ids": sampled,
            "prompt_token_ids": ids,
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": reason,
        }
        return {"choices": [choice]}
