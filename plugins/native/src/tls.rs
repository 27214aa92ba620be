//! Certificates in PEM → configurations of TLS, which can be replaced while they are in use.

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const HTTP2: &[u8] = b"h2";
/// What a server takes of a client's offers, the best first. What the client speaks is seen after the handshake.
const SERVED: [&[u8]; 3] = [HTTP2, b"http/1.1", b"http/1.0"];

/// A configuration that may be replaced by a newer one at any time, on any thread.
pub struct Newest<T> {
    config: Mutex<Arc<T>>,
    version: AtomicU64,
}

impl<T> Newest<T> {
    pub fn new(config: Arc<T>) -> Self {
        Newest { config: Mutex::new(config), version: AtomicU64::new(0) }
    }

    pub fn replace(&self, config: Arc<T>) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        self.version.fetch_add(1, Ordering::Release);
    }

    pub fn get(&self) -> Arc<T> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Differs once the configuration was replaced. Read it before `get`.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }
}

/// What one side shows: its certificate, then those between it and the root; and the certificate's key.
pub struct Shown<'a> {
    pub certificate: &'a [u8],
    pub key: &'a [u8],
}

type Built<T> = Result<Arc<T>, String>;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(told)
}

fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    // A system has authorities that rustls cannot read, such as certificates of version 1.
    let (added, _) = roots.add_parsable_certificates(chain(pem)?);
    if added == 0 { Err("none of the authorities can be used".to_owned()) } else { Ok(roots) }
}

/// `authorities` are of whom a client's certificate must be; None asks for no certificate.
pub fn server(shown: &Shown<'_>, authorities: Option<&[u8]>) -> Built<ServerConfig> {
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(told)?;
    let builder = match authorities {
        Some(pem) => {
            let roots = Arc::new(roots(pem)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().map_err(told)?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from_pem_slice(shown.key).map_err(told)?;
    let mut config = builder.with_single_cert(chain(shown.certificate)?, key).map_err(told)?;
    config.alpn_protocols = SERVED.map(<[u8]>::to_vec).to_vec();
    Ok(Arc::new(config))
}

pub fn client(authorities: &[u8], shown: Option<&Shown<'_>>) -> Built<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(told)?.with_root_certificates(roots(authorities)?);
    let mut config = match shown {
        Some(shown) => {
            let key = PrivateKeyDer::from_pem_slice(shown.key).map_err(told)?;
            builder.with_client_auth_cert(chain(shown.certificate)?, key).map_err(told)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(Arc::new(config))
}

pub fn server_name(name: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(name.trim_matches(['[', ']']).to_owned()).map_err(told)
}
