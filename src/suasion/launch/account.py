"""Access to one AWS account: clients, who the caller is, and errors in words.

Credentials are boto3's business (environment, profile, SSO); none is read, stored or sent on here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from suasion.errors import UserError

EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "AuthFailure",
}
FORBIDDEN = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"}


class Account:
    """Clients of one region, made when first used. Raises UserError where boto3 is not installed."""

    def __init__(self, region: str | None = None, attempts: int = 5):
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise UserError("launch needs boto3: pip install 'suasion[aws]'") from error
        # boto3 itself reads AWS_DEFAULT_REGION and profiles, not the variable that AWS's other tools know.
        self._session = boto3.Session(region_name=region or os.environ.get("AWS_REGION") or None)
        if not self._session.region_name:
            raise UserError("no AWS region is set. Give --region, for example --region us-east-1, or set AWS_REGION.")
        self.region: str = self._session.region_name
        # A lost connection is tried again by botocore itself; whatever it asks for twice is idempotent here.
        self._config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=10,
            read_timeout=60,
            user_agent_extra="suasion",
        )

    def client(self, service: str, region: str | None = None) -> Any:
        """A boto3 client of this account."""
        return self._session.client(service, region_name=region or self.region, config=self._config)

    @cached_property
    def ec2(self) -> Any:
        """EC2 of the region."""
        return self.client("ec2")

    @cached_property
    def iam(self) -> Any:
        """IAM, which has no region."""
        return self.client("iam")

    @cached_property
    def id(self) -> str:
        """Number of the account that the caller's credentials belong to. Raises UserError for none or expired ones."""
        with told("ask AWS who you are"):
            return str(self.client("sts").get_caller_identity()["Account"])


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Turn boto3's errors into messages with the next step. `doing` completes 'could not ...'."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise UserError(f"could not {doing}: no AWS credentials. Set AWS_PROFILE, or run: aws configure") from error
    except ClientError as error:
        code, message = code_of(error), error.response["Error"].get("Message", "")
        step = "Try again; what was made before stays known to: suasion launch sweep-up"
        if code in EXPIRED:
            step = (
                "Your credentials are expired or wrong: renew them (aws sso login, or new keys) and run the same command again."
            )
        elif code == "NoSuchBucket":
            step = "Make it with: aws s3 mb s3://BUCKET, or name another place."
        elif code in FORBIDDEN:
            step = "Your credentials may not do this; docs/EXECUTION_GUIDE.md lists the permissions that launch needs."
        raise UserError(f"could not {doing}: AWS says {code}: {message.rstrip('.')}. {step}") from error
    except (BotoCoreError, Boto3Error) as error:  # the latter where a transfer of S3 was tried often enough
        raise UserError(f"could not {doing}: {error}. Look at the network and at AWS's status, then try again.") from error


def code_of(error: Any) -> str:
    """AWS's code of a ClientError, '' for other errors."""
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
