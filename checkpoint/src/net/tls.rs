//! Mutual TLS: an agent talks only to holders of a certificate of its CA, whoever dialled whom.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite};
use serde::{Deserialize, Serialize};

/// Where this node's certificates lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate of the authority both ends must be issued by, PEM.
    pub ca: PathBuf,
    /// This node's certificate, PEM; later certificates in the file are its chain.
    pub cert: PathBuf,
    /// Its private key, PEM, readable by nobody else.
    pub key: PathBuf,
}

impl Default for TlsFiles {
    fn default() -> Self {
        let dir = Path::new("/etc/migrrdma/pki");
        TlsFiles { ca: dir.join("ca.pem"), cert: dir.join("node.pem"), key: dir.join("node.key") }
    }
}

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {what} {}; `migrrdma pki init` and `migrrdma pki issue` make it", .path.display())]
    Read { what: &'static str, path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("{what} {} holds no certificate", .path.display())]
    Empty { what: &'static str, path: PathBuf },
    #[error("the private key {} is readable by others; `chmod 600` it", .0.display())]
    Open(PathBuf),
    #[error("certificate {} cannot be used", .path.display())]
    Use { path: PathBuf, source: rustls::Error },
    #[error("CA {} cannot be used", .path.display())]
    Verifier { path: PathBuf, source: rustls::server::VerifierBuilderError },
}

/// Both halves of this node's identity.
#[derive(Clone, Debug)]
pub struct Identity {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads and checks the files.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let provider = Arc::new(provider(has_aes()));
        let mut roots = RootCertStore::empty();
        for cert in certs("CA", &files.ca)? {
            roots.add(cert).map_err(|source| TlsError::Use { path: files.ca.clone(), source })?;
        }
        let roots = Arc::new(roots);
        let chain = certs("node certificate", &files.cert)?;
        if fs::metadata(&files.key).is_ok_and(|m| m.permissions().mode() & 0o077 != 0) {
            return Err(TlsError::Open(files.key.clone()));
        }
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::Read {
            what: "private key",
            path: files.key.clone(),
            source,
        })?;
        let wrap = |source| TlsError::Use { path: files.cert.clone(), source };

        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(wrap)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(wrap)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|source| TlsError::Verifier { path: files.ca.clone(), source })?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(wrap)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(wrap)?;
        // Tickets would arrive on idle connections, where the client takes any byte for a sign of death.
        server.send_tls13_tickets = 0;
        Ok(Identity { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// Whether the processor has instructions for AES.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has
}

/// rustls wants AES first. Without an instruction for it `ChaCha20` takes a fraction of the time, and what an image takes to
/// be encrypted is time inside the pause.
fn provider(has_aes: bool) -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    if !has_aes {
        let is_chacha = |suite: &SupportedCipherSuite| suite.suite() == CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;
        // Stable: the others stay as they are.
        provider.cipher_suites.sort_by_key(|suite| !is_chacha(suite));
    }
    provider
}

fn certs(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read { what, path: path.into(), source };
    let list: Vec<_> = CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
    if list.is_empty() {
        return Err(TlsError::Empty { what, path: path.into() });
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_instructions_for_aes_another_cipher_is_wanted_first_and_none_is_given_up() {
        let suites =
            |has_aes| provider(has_aes).cipher_suites.iter().map(SupportedCipherSuite::suite).collect::<Vec<_>>();
        let (with, without) = (suites(true), suites(false));
        assert_eq!(with[0], CipherSuite::TLS13_AES_256_GCM_SHA384);
        assert_eq!(without[0], CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
        assert!(with.len() == without.len() && with.iter().all(|suite| without.contains(suite)));
    }
}
