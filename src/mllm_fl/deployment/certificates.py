"""Certificates and keys of a federation: a certificate authority of its own, the server's certificate, one key pair a site.

The same with openssl and ssh-keygen, for those who keep their keys with other tools, stands in docs/deploy.md.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError

CA_DAYS, SERVER_DAYS = 3650, 825


def make_authority(folder: Path, server: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> None:
    """``ca.crt`` and ``ca.key`` in ``folder`` (kept if they are there); ``server.crt`` and ``server.key`` for these hosts in ``server``.

    Raises:
        UserError: the authority that is there cannot sign: garbled, or a key that is not its own.
    """
    x509, hashes, _, ec, name_oid, usage = _library()
    now = datetime.datetime.now(datetime.UTC)
    if (folder / "ca.crt").exists():
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        way_out = "sign server.crt where the authority's key is (docs/deploy.md has the lines), or restore both files"
        try:
            ca_key: Any = load_pem_private_key((folder / "ca.key").read_bytes(), None)
            there = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except (OSError, ValueError, TypeError) as e:
            raise UserError(folder / "ca.key", "this or ca.crt cannot be read", way_out) from e
        if there.public_key() != ca_key.public_key():
            raise UserError(folder / "ca.key", "is not the key of ca.crt", way_out)
        issuer = there.subject
    else:
        ca_key = ec.generate_private_key(ec.SECP384R1())
        issuer = x509.Name([x509.NameAttribute(name_oid.COMMON_NAME, "mllm-fl federation CA")])
        ca = (
            _begun(x509, issuer, issuer, ca_key.public_key(), now, CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(x509, sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA384())
        )
        _private(folder / "ca.key", _pem(ca_key))
        write_atomic(folder / "ca.crt", _certificate(ca))
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(name_oid.COMMON_NAME, hosts[0][:64])])
    made = (
        _begun(x509, subject, issuer, key.public_key(), now, days)
        .add_extension(x509.SubjectAlternativeName([_name(x509, h) for h in dict.fromkeys(hosts)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _private(server / "server.key", _pem(key))
    write_atomic(server / "server.crt", _certificate(made))


def make_node_key(folder: Path) -> None:
    """``key`` and ``key.pub``: ECDSA on P-384 in OpenSSH's format, which is what Flower takes."""
    _, _, serialization, ec, _, _ = _library()
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    _private(folder / "key", key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / "key.pub").write_bytes(public + b"\n")


def _library() -> tuple[Any, Any, Any, Any, Any, Any]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as e:
        raise UserError("certificates", "cryptography is not installed", "pip install 'mllm-fl[flower]'") from e
    return x509, hashes, serialization, ec, NameOID, ExtendedKeyUsageOID


def _begun(x509: Any, subject: Any, issuer: Any, public: Any, now: datetime.datetime, days: int) -> Any:
    before = min(now, now + datetime.timedelta(days=days)) - datetime.timedelta(minutes=10)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(before - datetime.timedelta(days=1 if days < 0 else 0))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(x509: Any, sign: bool) -> Any:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{n: sign and n in ("key_cert_sign", "crl_sign") for n in names})


def _name(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    found: bytes = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    return found


def _certificate(made: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    found: bytes = made.public_bytes(Encoding.PEM)
    return found


def _private(path: Path, data: bytes) -> None:
    """A file that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(data)
