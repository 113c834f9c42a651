"""What Flower's logs mean, in one line for the person who can mend it."""

from __future__ import annotations

SIGNS = (  # words in Flower's logs -> what they mean for the person who reads the one line
    ("could not be activated", "the server still holds this site's last process to be online; trying again"),
    (
        "Failed to activate SuperNode",
        "the server does not take this site (key not registered, or its last process still held to be online); trying again",
    ),
    ("must be registered", "this site's key is not registered; on the server: mllm-fl deploy register"),
    ("certificate has expired", "the server's certificate has expired; on the server: mllm-fl deploy renew"),
    ("certificate is not yet valid", "the server's certificate is not valid yet: a clock is wrong"),
    (
        "ostname mismatch",
        "the server's certificate does not name this host; on the server: mllm-fl deploy renew DIR --host NAME",
    ),
    (
        "IP address mismatch",
        "the server's certificate does not name this address; on the server: mllm-fl deploy renew DIR --host NAME",
    ),
    ("WRONG_VERSION_NUMBER", "no TLS at the server's port: another program listens there, or a SuperLink without TLS"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not signed by this site's ca.crt"),
    ("Address already in use", "the port is taken by another process"),
    ("address already in use", "the port is taken by another process"),
    ("timestamp", "the clocks of this site and the server differ by more than the server accepts"),
)
FAILED, FOUND = "Connection attempt failed", "Connection successful"  # Flower's words while it goes on trying for ever
TRIES = 4  # after so many in a row a person is told; its own parts find one another after one or two


def meaning(text: str) -> str:
    """Why the process that wrote this has ended; "" where we do not know."""
    return next((said for sign, said in SIGNS if sign in text), "")


def alone(text: str) -> bool:
    """Whether the process that writes this goes on and on without reaching its server."""
    return text.rpartition(FOUND)[2].count(FAILED) >= TRIES
