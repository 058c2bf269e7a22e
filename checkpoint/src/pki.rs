//! A certificate authority small enough for two hosts: makes a CA and node certificates for those who have none.
//!
//! Files are plain PEM, so any other tool may make them instead. This module deliberately knows nothing of
//! connections ([`crate::net::tls`] reads the files) and never replaces a file that exists.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

/// Name of the authority in its own certificate.
const CA_NAME: &str = "migrrdma CA";

/// Life of a certificate, days: long enough that nobody is surprised in the night, and short enough to be replaced.
const LIFE_DAYS: u64 = 3650;

/// What went wrong while making certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{} exists already; move it away first or use another directory", .0.display())]
    Exists(PathBuf),
    #[error("cannot write {}", .path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot read {}; `migrrdma pki init` makes it", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is not a usable {what}", .path.display())]
    Unusable { path: PathBuf, what: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("a node certificate needs at least one --ip or --dns: other agents check it against the address they dial")]
    NoAddress,
    #[error("a node name is letters, digits, '-', '_' and '.'; {0:?} is not")]
    BadName(String),
    #[error("making the certificate")]
    Make(#[from] rcgen::Error),
    #[error("{} and {} do not belong together: a certificate made with them does not verify", .cert.display(), .key.display())]
    Mismatch { cert: PathBuf, key: PathBuf },
}

/// The files of one issued node certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Makes `dir/ca.pem` and `dir/ca.key`.
pub fn init(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| PkiError::Write { path: dir.into(), source })?;
    let (cert, key) = (dir.join("ca.pem"), dir.join("ca.key"));
    for path in [&cert, &key] {
        if path.exists() {
            return Err(PkiError::Exists(path.clone()));
        }
    }
    let pair = KeyPair::generate()?;
    let made = ca_params()?.self_signed(&pair)?;
    write_new(&key, 0o600, &pair.serialize_pem())?;
    write_new(&cert, 0o644, &made.pem())
}

/// Makes `dir/NAME.pem` and `dir/NAME.key`, signed by the CA in `dir`, valid for these addresses.
pub fn issue(dir: &Path, name: &str, ips: &[IpAddr], dns: &[String]) -> Result<Issued, PkiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.starts_with('.') || name == "ca" || !name.chars().all(plain) {
        return Err(PkiError::BadName(name.into()));
    }
    if ips.is_empty() && dns.is_empty() {
        return Err(PkiError::NoAddress);
    }
    let (ca_cert, ca_key) = (dir.join("ca.pem"), dir.join("ca.key"));
    let read = |path: &Path| fs::read_to_string(path).map_err(|source| PkiError::Read { path: path.into(), source });
    let pair = KeyPair::from_pem(&read(&ca_key)?).map_err(|e| unusable(&ca_key, "private key", e))?;
    let root =
        CertificateDer::from_pem_slice(read(&ca_cert)?.as_bytes()).map_err(|e| unusable(&ca_cert, "certificate", e))?;

    let mut params = CertificateParams::new(dns.to_vec())?;
    params.subject_alt_names.extend(ips.iter().map(|ip| SanType::IpAddress(*ip)));
    params.distinguished_name = named(name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_life(&mut params);
    let node = KeyPair::generate()?;
    let made = params.signed_by(&node, &Issuer::new(ca_params()?, pair))?;
    let first = ips.first().map(|ip| ServerName::from(*ip));
    let first = match first {
        Some(name) => name,
        None => ServerName::try_from(dns[0].clone()).map_err(|e| unusable(&ca_cert, "DNS name", e))?,
    };
    if !verifies(&root, made.der(), &first) {
        return Err(PkiError::Mismatch { cert: ca_cert, key: ca_key });
    }
    let issued = Issued { cert: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) };
    for path in [&issued.cert, &issued.key] {
        if path.exists() {
            return Err(PkiError::Exists(path.clone()));
        }
    }
    write_new(&issued.key, 0o600, &node.serialize_pem())?;
    write_new(&issued.cert, 0o644, &made.pem())?;
    Ok(issued)
}

fn unusable(path: &Path, what: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> PkiError {
    PkiError::Unusable { path: path.into(), what, source: Box::new(source) }
}

fn named(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

fn ca_params() -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name = named(CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_life(&mut params);
    Ok(params)
}

/// From yesterday, so that a host whose clock is a little behind accepts it.
fn set_life(params: &mut CertificateParams) {
    let day = std::time::Duration::from_secs(86_400);
    let now = SystemTime::now();
    params.not_before = (now - day).into();
    params.not_after = (now + day * u32::try_from(LIFE_DAYS).unwrap_or(u32::MAX)).into();
}

fn verifies(root: &CertificateDer<'_>, cert: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    use rustls::client::danger::ServerCertVerifier;
    let mut roots = rustls::RootCertStore::empty();
    if roots.add(root.clone().into_owned()).is_err() {
        return false;
    }
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build();
    verifier.is_ok_and(|v| v.verify_server_cert(cert, &[], name, &[], UnixTime::now()).is_ok())
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), PkiError> {
    let wrap = |source| PkiError::Write { path: path.into(), source };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(wrap)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(wrap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_certificate_needs_its_own_ca_and_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path()).unwrap();
        assert!(matches!(init(dir.path()), Err(PkiError::Exists(_))));
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let issued = issue(dir.path(), "src", &[ip], &[]).unwrap();
        assert!(issued.cert.exists() && issued.key.exists());
        assert!(matches!(issue(dir.path(), "src", &[ip], &[]), Err(PkiError::Exists(_))));
        assert!(matches!(issue(dir.path(), "x", &[], &[]), Err(PkiError::NoAddress)));
        assert!(matches!(issue(dir.path(), "../x", &[ip], &[]), Err(PkiError::BadName(_))));

        let other = tempfile::tempdir().unwrap();
        init(other.path()).unwrap();
        fs::copy(other.path().join("ca.key"), dir.path().join("ca.key")).unwrap();
        assert!(matches!(issue(dir.path(), "y", &[ip], &[]), Err(PkiError::Mismatch { .. })));
    }

    #[test]
    fn private_keys_are_for_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        init(dir.path()).unwrap();
        let mode = fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
