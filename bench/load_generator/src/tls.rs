//! TLS 1.3 to the server, whose certificate is checked.

use anyhow::{Context, ensure};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, version};

const HTTP2: &[u8] = b"h2";

/// Whom all connections trust.
pub struct Tls(TlsConnector);

impl Tls {
    /// With the authorities in a PEM file.
    pub fn new(file: &Path) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        let read = CertificateDer::pem_file_iter(file).with_context(|| format!("cannot read {}", file.display()))?;
        for certificate in read {
            roots.add(certificate.with_context(|| format!("{} is malformed", file.display()))?)?;
        }
        ensure!(!roots.is_empty(), "{} has no certificate", file.display());
        let versions = [&version::TLS13];
        let mut config =
            ClientConfig::builder_with_protocol_versions(&versions).with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![HTTP2.to_vec()];
        Ok(Tls(Arc::new(config).into()))
    }

    /// Shakes hands with the server at `address`, whose certificate must be for the host in it.
    pub async fn connect(&self, address: &str, stream: TcpStream) -> anyhow::Result<TlsStream<TcpStream>> {
        let (host, _) = address.rsplit_once(':').with_context(|| format!("{address} has no port"))?;
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        self.0.connect(name, stream).await.with_context(|| format!("no TLS with {address}"))
    }
}
