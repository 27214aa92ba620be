//! A connection to the server, with TLS or without.

use crate::tls::Tls;
use anyhow::Context as _;
use bytes::Bytes;
use h2::client::SendRequest;
use load_generator::together::{Together, WINDOW};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Connects and shakes hands. The connection's own work goes on in a task of the runtime.
pub async fn open(address: &str, tls: Option<&Tls>) -> anyhow::Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?; // else a request may wait for the acknowledgement of the one before
    match tls {
        None => speak(address, stream).await,
        Some(tls) => speak(address, tls.connect(address, stream).await?).await,
    }
}

async fn speak<T>(address: &str, stream: T) -> anyhow::Result<SendRequest<Bytes>>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let writer = Together::new(stream);
    let mut builder = h2::client::Builder::new();
    builder.enable_push(false).initial_window_size(WINDOW).initial_connection_window_size(WINDOW);
    let mut handshake = pin!(builder.handshake(writer.clone()));
    let shaken = poll_fn(|cx| writer.poll_then_send(cx, |cx| handshake.as_mut().poll(cx))).await;
    let (sender, mut connection) = shaken.with_context(|| format!("{address} does not speak HTTP/2"))?;
    tokio::task::spawn_local(async move {
        // Its errors reach the requests too, and are counted there.
        let _ = poll_fn(|cx| writer.poll_then_send(cx, |cx| Pin::new(&mut connection).poll(cx))).await;
    });
    Ok(sender)
}
