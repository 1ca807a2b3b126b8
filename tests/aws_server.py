"""An AWS for tests, over real HTTP: moto's server behind a proxy that can cut any connection, and that adds what moto lacks.

moto 5.2.5 knows no EC2 quotas, no price list and no deep-learning image, and forgets client tokens; the proxy answers for those as AWS's
documentation says. `faults` maps a call's number (from 0) or an action's name to what happens to it:
'before': the connection closes unanswered and nothing happened; 'after': it happened and the answer is lost; an (HTTP status, code) or
(HTTP status, code, message): an error.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IMAGE = "ami-12c6146b"  # one of moto's own
MAKING = {"ImportKeyPair", "CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "RunInstances", "CreateRole", "PutRolePolicy",
          "CreateInstanceProfile", "AddRoleToInstanceProfile"}  # fmt: skip


class Aws:
    """The state of the proxy; tests change it between calls."""

    def __init__(self, backend: int):
        self.backend = backend
        self.calls: list[str] = []
        self.requests: list[tuple[str, bytes]] = []
        self.faults: dict[int | str, object] = {}
        self.quotas: dict[str, float] = {}
        self.prices: dict[str, float] = {"g5.xlarge": 1.006, "g6.xlarge": 0.8048, "t3.large": 0.0832}
        self.no_capacity: set[str] = set()  # zones
        self.account = ""  # '' for moto's own
        self._tokens: dict[str, tuple[int, bytes, str]] = {}
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget everything, moto's state included."""
        connection = http.client.HTTPConnection("127.0.0.1", self.backend)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        self.__init__(self.backend)

    def number(self, action: str, body: bytes) -> int:
        """Note a call; returns its number."""
        with self._lock:
            self.calls.append(action)
            self.requests.append((action, body))
            return len(self.calls) - 1

    def own_answer(self, action: str, body: bytes) -> tuple[int, bytes, str] | None:
        """What moto cannot answer, or None."""
        if action in ("GetServiceQuota", "GetAWSDefaultServiceQuota"):
            code = json.loads(body)["QuotaCode"]
            return (
                200,
                json.dumps({"Quota": {"QuotaCode": code, "Value": self.quotas.get(code, 64.0)}}).encode(),
                "application/x-amz-json-1.1",
            )
        if action == "GetProducts":
            name = next(item["Value"] for item in json.loads(body)["Filters"] if item["Field"] == "instanceType")
            term = {"priceDimensions": {"d": {"unit": "Hrs", "pricePerUnit": {"USD": str(self.prices.get(name, 0))}}}}
            rows = [json.dumps({"terms": {"OnDemand": {"t": term}}})] if name in self.prices else []
            return 200, json.dumps({"FormatVersion": "aws_v1", "PriceList": rows}).encode(), "application/x-amz-json-1.1"
        if action == "GetParameter":
            value = {"Parameter": {"Name": json.loads(body)["Name"], "Value": IMAGE, "Type": "String"}}
            return 200, json.dumps(value).encode(), "application/x-amz-json-1.1"
        if action == "GetCallerIdentity" and self.account:
            text = (
                '<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>'
                f"<Arn>arn:aws:iam::{self.account}:user/x</Arn><UserId>x</UserId><Account>{self.account}</Account>"
                "</GetCallerIdentityResult></GetCallerIdentityResponse>"
            )
            return 200, text.encode(), "text/xml"
        form = dict(urllib.parse.parse_qsl(body.decode(errors="replace")))
        if action == "RunInstances":
            if any(value in self.no_capacity for value in self._zones(form)):
                return ec2_error(500, "InsufficientInstanceCapacity")
            return self._tokens.get(form.get("ClientToken", ""))
        return None

    def remember(self, action: str, body: bytes, answer: tuple[int, bytes, str]) -> None:
        """Client tokens: asking again with the same one gives the same machine."""
        if action == "RunInstances" and answer[0] == 200:
            token = dict(urllib.parse.parse_qsl(body.decode())).get("ClientToken")
            if token:
                self._tokens[token] = answer

    def _zones(self, form: dict[str, str]) -> list[str]:
        import boto3

        client = boto3.client("ec2", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{self.backend}")
        subnet = form["NetworkInterface.1.SubnetId"]
        return [client.describe_subnets(SubnetIds=[subnet])["Subnets"][0]["AvailabilityZone"]]


def ec2_error(status: int, code: str, message: str = "as the test wants") -> tuple[int, bytes, str]:
    """An error as EC2, IAM and STS word it."""
    inner = f"<Code>{code}</Code><Message>{message}</Message>"
    text = f"<Response><Errors><Error>{inner}</Error></Errors><Error>{inner}</Error><RequestID>r</RequestID></Response>"
    return status, text.encode(), "text/xml"


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    aws: Aws

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = self.headers.get("X-Amz-Target", "")
        action = target.rpartition(".")[2] or dict(urllib.parse.parse_qsl(body.decode(errors="replace"))).get(
            "Action", self.command
        )
        number = self.aws.number(action, body)
        fault = self.aws.faults.get(number) or self.aws.faults.get(action) or self.aws.faults.get("*")
        if fault == "before":
            self._cut()
            return
        if isinstance(fault, tuple):
            self._answer(
                *(
                    ec2_error(*fault)
                    if not target
                    else (fault[0], json.dumps({"__type": fault[1], "message": "x"}).encode(), "application/x-amz-json-1.1")
                )
            )
            return
        answer = self.aws.own_answer(action, body) or self._forward(body)
        self.aws.remember(action, body, answer)
        if fault == "after":
            self._cut()
            return
        self._answer(*answer)

    def _forward(self, body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.aws.backend, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("content-length", "expect")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers.get("Content-Type", "text/xml")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve


@contextmanager
def serve():
    """Yield (Aws, address of the proxy)."""
    from moto.server import ThreadedMotoServer

    backend = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    backend.start()
    aws = Aws(backend.get_host_and_port()[1])
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"aws": aws}))
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield aws, f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        backend.stop()
