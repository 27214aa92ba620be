//! Sockets of either kind, with and without TLS.

use crate::fork::Ours;
use dl_inference_grpc::Authorities;
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio_rustls::TlsStream;

/// The first bytes of a TLS handshake, of a TLS alert, and of HTTP/2.
const HANDSHAKE: &[u8] = b"\x16\x03";
const ALERT: &[u8] = b"\x15\x03";
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a connection may be silent before TCP asks whether the other side is there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);

/// A listening socket.
pub enum Listener {
    Tcp { _ours: Ours, listener: TcpListener },
    Unix { _ours: Ours, listener: UnixListener },
}

/// A listening or connected socket on its way to an I/O thread.
pub enum Moving<T, U> {
    Tcp(Ours, T),
    Unix(Ours, U),
}

pub type MovingListener = Moving<std::net::TcpListener, std::os::unix::net::UnixListener>;
pub type MovingStream = Moving<std::net::TcpStream, std::os::unix::net::UnixStream>;

impl Listener {
    pub fn of(moving: MovingListener) -> io::Result<Listener> {
        Ok(match moving {
            Moving::Tcp(ours, listener) => Listener::Tcp { _ours: ours, listener: TcpListener::from_std(listener)? },
            Moving::Unix(ours, listener) => Listener::Unix { _ours: ours, listener: UnixListener::from_std(listener)? },
        })
    }

    pub async fn accept(&self) -> io::Result<MovingStream> {
        Ok(match self {
            Listener::Tcp { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Moving::Tcp(Ours::new(&stream), stream.into_std()?)
            }
            Listener::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Moving::Unix(Ours::new(&stream), stream.into_std()?)
            }
        })
    }
}

/// Connects to one of the addresses that `address`, a host and a port, stands for.
pub async fn connect_tcp(address: &str) -> io::Result<MovingStream> {
    let mut last = io::Error::other("the name has no address");
    for address in tokio::net::lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Where this fails, the socket is closed before `ours` is dropped. A socket that another thread opens with the
        // same number in between is not noted, and a child that is forked while that lives keeps it.
        let ours = Ours::new(&socket);
        match socket.connect(address).await {
            Ok(stream) => return Ok(Moving::Tcp(ours, stream.into_std()?)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

pub async fn connect_unix(path: &str) -> io::Result<MovingStream> {
    let stream = UnixStream::connect(path).await?;
    Ok(Moving::Unix(Ours::new(&stream), stream.into_std()?))
}

/// A connected socket.
enum Raw {
    Tcp { _ours: Ours, stream: TcpStream },
    Unix { _ours: Ours, stream: UnixStream },
}

/// A connected socket in clear text.
pub struct Plain {
    raw: Raw,
    /// Whether the first bytes must be those of an HTTP/2 server.
    expects_server: bool,
}

impl Plain {
    /// `unacknowledged` is how long what was sent may go without TCP's acknowledgement.
    pub fn of(moving: MovingStream, unacknowledged: Option<Duration>) -> io::Result<Plain> {
        let raw = match moving {
            Moving::Tcp(ours, stream) => {
                stream.set_nodelay(true)?; // else an answer's trailers wait for the acknowledgement of its data
                let socket = SockRef::from(&stream);
                socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(TCP_KEEPALIVE))?;
                #[cfg(target_os = "linux")]
                socket.set_tcp_user_timeout(unacknowledged)?;
                Raw::Tcp { _ours: ours, stream: TcpStream::from_std(stream)? }
            }
            Moving::Unix(ours, stream) => Raw::Unix { _ours: ours, stream: UnixStream::from_std(stream)? },
        };
        Ok(Plain { raw, expects_server: false })
    }

    /// Has reading fail where the other side is not an HTTP/2 server in clear text.
    pub fn expect_server(mut self) -> Self {
        self.expects_server = true;
        self
    }
}

/// What a client speaks, from its first bytes.
#[derive(Debug, PartialEq)]
pub enum Spoken {
    Http2,
    Tls,
    /// HTTP/1, or nothing that is known here.
    Other,
}

/// Reads as much as tells what the client speaks. What was read is read again from the socket.
pub async fn sniff(socket: &mut Socket) -> io::Result<Spoken> {
    let mut begun = Vec::with_capacity(HTTP2.len());
    let spoken = loop {
        if begun == HTTP2 {
            break Spoken::Http2;
        } else if begun.starts_with(HANDSHAKE) {
            break Spoken::Tls;
        } else if !HTTP2.starts_with(&begun) && !HANDSHAKE.starts_with(&begun) {
            break Spoken::Other;
        }
        let missing = HTTP2.len() - begun.len();
        if (&mut *socket).take(missing as u64).read_buf(&mut begun).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    socket.read_already = begun;
    Ok(spoken)
}

/// A connected socket, perhaps with TLS.
pub struct Socket {
    wire: Wire,
    /// What was read while the protocol was found out.
    read_already: Vec<u8>,
    authorities: Option<Box<Authorities>>,
}

pub enum Wire {
    Plain(Box<Plain>),
    Tls(Box<TlsStream<Plain>>),
}

impl Socket {
    /// Of a node.
    pub fn new(wire: Wire) -> Socket {
        Socket { wire, read_already: vec![], authorities: None }
    }

    /// For a protocol other than HTTP/2.
    pub fn without_authorities(self) -> Socket {
        Socket { authorities: None, ..self }
    }

    /// Of a client; with whatever authority it names this server.
    pub fn of_client(wire: Wire) -> Socket {
        Socket { authorities: Some(Box::default()), ..Socket::new(wire) }
    }
}

fn check_server(begun: &[u8]) -> io::Result<()> {
    if begun.starts_with(ALERT) {
        return Err(io::Error::other("the node speaks TLS, and this connection does not"));
    }
    if begun.starts_with(b"HTTP/1") {
        return Err(io::Error::other("the node answered with HTTP/1; expected HTTP/2"));
    }
    Ok(())
}

impl AsyncRead for Plain {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = match &mut self.raw {
            Raw::Tcp { stream, .. } => Pin::new(stream).poll_read(cx, buf),
            Raw::Unix { stream, .. } => Pin::new(stream).poll_read(cx, buf),
        };
        if self.expects_server && matches!(polled, Poll::Ready(Ok(()))) {
            self.expects_server = false;
            check_server(buf.filled().get(before..).unwrap_or_default())?;
        }
        polled
    }
}

impl AsyncWrite for Plain {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.raw {
            Raw::Tcp { stream, .. } => Pin::new(stream).poll_write(cx, buf),
            Raw::Unix { stream, .. } => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.raw {
            Raw::Tcp { stream, .. } => Pin::new(stream).poll_write_vectored(cx, bufs),
            Raw::Unix { stream, .. } => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.raw {
            Raw::Tcp { stream, .. } => Pin::new(stream).poll_shutdown(cx),
            Raw::Unix { stream, .. } => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let again = self.read_already.len().min(buf.remaining());
        if again > 0 {
            buf.put_slice(self.read_already.drain(..again).as_slice());
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(match &mut self.wire {
            Wire::Plain(plain) => Pin::new(plain).poll_read(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        })?;
        if let Some(authorities) = &mut self.authorities {
            authorities.pass(buf.filled_mut().get_mut(before..).unwrap_or_default());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(plain) => Pin::new(plain).poll_write(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(plain) => Pin::new(plain).poll_write_vectored(cx, bufs),
            Wire::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(plain) => Pin::new(plain).poll_flush(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(plain) => Pin::new(plain).poll_shutdown(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
