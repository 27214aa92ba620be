//! A node that answers each request with its own bytes, and costs next to nothing: what gateways are measured in front of.
//!
//! `echo [N]` listens on N ports of the loopback device, on one thread, and prints "serving on HOST:PORT,HOST:PORT,…".

use anyhow::Context as _;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::{self, SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response};
use load_generator::together::{Together, WINDOW};
use std::future::poll_fn;
use std::pin::pin;
use std::process::ExitCode;
use tokio::net::{TcpListener, TcpStream};

const HEALTH: &str = "/grpc.health.v1.Health/Check";
/// HealthCheckResponse{status: SERVING}, in gRPC's frame.
const SERVING: &[u8] = b"\0\0\0\0\x02\x08\x01";
/// Of the largest frame of DATA that is taken. Nodes on the transport `native` take as much.
const FRAME_BYTES: u32 = 256 << 10;

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> anyhow::Result<()> {
    let ports = std::env::args().nth(1).map_or(Ok(1), |text| text.parse::<usize>()).context("usage: echo [PORTS]")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let mut listeners = vec![];
        for _ in 0..ports {
            listeners.push(TcpListener::bind("127.0.0.1:0").await?);
        }
        let addresses = listeners.iter().map(|listener| Ok(listener.local_addr()?.to_string()));
        println!("serving on {}", addresses.collect::<anyhow::Result<Vec<_>>>()?.join(","));
        for listener in listeners {
            tokio::task::spawn_local(accept(listener));
        }
        std::future::pending().await
    })
}

async fn accept(listener: TcpListener) {
    // A connection that breaks is its client's business.
    while let Ok((stream, _)) = listener.accept().await {
        tokio::task::spawn_local(speak(stream));
    }
}

async fn speak(stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?; // else an answer may wait for the acknowledgement of the one before
    let writer = Together::new(stream);
    let mut builder = server::Builder::new();
    builder.initial_window_size(WINDOW).initial_connection_window_size(WINDOW).max_frame_size(FRAME_BYTES);
    let mut handshake = pin!(builder.handshake(writer.clone()));
    let mut connection = poll_fn(|cx| writer.poll_then_send(cx, |cx| handshake.as_mut().poll(cx))).await?;
    while let Some(call) = poll_fn(|cx| writer.poll_then_send(cx, |cx| connection.poll_accept(cx))).await {
        let (request, respond) = call?;
        tokio::task::spawn_local(answer(request, respond));
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let health = request.uri().path() == HEALTH;
    let mut body = request.into_body();
    let mut pieces = vec![];
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        pieces.push(piece);
    }
    if health {
        pieces = vec![Bytes::from_static(SERVING)];
    }
    let mut head = Response::new(());
    head.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut stream = respond.send_response(head, false)?;
    for piece in pieces {
        // What the other side's window has no room for waits here: no more than it has sent.
        stream.send_data(piece, false)?;
    }
    stream.send_trailers(HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]))
}
