//! The connection of an I/O thread to a node, made anew when it is needed.

use crate::coalesce::Coalesce;
use crate::io::{Common, Io};
use crate::server::{CONNECTION_WINDOW, DECODED_HEADERS, FRAME_BYTES, SMALL_FRAMES};
use crate::signs::Signs;
use crate::socket::{Plain, Socket, Wire, connect_tcp, connect_unix};
use crate::tls::Newest;
use crate::window::{LARGE, SMALL, Window};
use bytes::Bytes;
use dl_inference_grpc::{Code, Failure};
use h2::client::{Connection, SendRequest};
use h2::{RecvStream, SendStream};
use http::uri::Authority;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{sleep_until, timeout};
use tokio_rustls::{TlsConnector, TlsStream};

/// Streams of which this process remembers that it has reset them, so that it passes over their late frames.
const RESET_STREAMS: usize = 10_000;
/// Between two PINGs, as long as only their answers come. By default gRPC's servers end a connection at the third PING
/// that comes within five minutes of the one before.
const PING_SPACING: Duration = Duration::from_secs(300);

/// Streams that have ended and are kept, of each connection; 32 requests in flight at four nodes have as many.
const ENDED: usize = 8;

/// How TLS is spoken with a node.
pub struct NodeTls {
    pub config: Arc<Newest<ClientConfig>>,
    pub name: ServerName<'static>,
}

/// Where a node is. Every thread may read it.
pub struct Target {
    pub id: u64,
    pub address: String,
    pub authority: Authority,
    pub message_bytes: usize,
    pub tls: Option<NodeTls>,
    pub closed: AtomicBool,
}

/// What sends one request.
pub struct Sender {
    pub send: SendRequest<Bytes>,
    /// Kept for as long as the request is in flight: so its connection knows that there is one.
    pub window: Rc<Window>,
    pub writer: Coalesce<Socket>,
}

#[derive(Clone)]
struct Live {
    send: SendRequest<Bytes>,
    window: Weak<Window>,
    writer: Coalesce<Socket>,
    /// Of the TLS configuration that it was made with.
    version: u64,
}

/// The connection of one I/O thread to a node.
pub struct NodeHere {
    target: Arc<Target>,
    live: RefCell<Option<Live>>,
    /// Held while one of those who wait connects for all of them. It belongs to this thread alone.
    connecting: Mutex<()>,
    tries: Cell<u64>,
    last_error: RefCell<String>,
    /// Whether a connection with new certificates is being made beside one that stands.
    renewing: Cell<bool>,
    tasks: RefCell<Vec<AbortHandle>>,
    ended: RefCell<Vec<(SendStream<Bytes>, RecvStream)>>,
}

impl NodeHere {
    pub fn of(io: &Io, target: &Arc<Target>) -> Rc<NodeHere> {
        let make = || {
            Rc::new(NodeHere {
                target: target.clone(),
                live: RefCell::default(),
                connecting: Mutex::new(()),
                tries: Cell::new(0),
                last_error: RefCell::default(),
                renewing: Cell::new(false),
                tasks: RefCell::default(),
                ended: RefCell::default(),
            })
        };
        io.nodes.borrow_mut().entry(target.id).or_insert_with(make).clone()
    }

    /// Ends the connection, and so all that is in flight on it.
    pub fn close(&self) {
        self.live.take();
        self.forget_ended();
        for task in self.tasks.take() {
            task.abort();
        }
    }

    /// What can send a request now. One caller connects, the others wait for how that ends.
    pub async fn sender(self: &Rc<Self>, io: &Io) -> Result<Sender, Failure> {
        let tries = self.tries.get();
        for _ in 0..3 {
            let live = self.live.borrow().clone();
            if let Some(Live { send, window, writer, version }) = live {
                if let (Some(window), Ok(send)) = (window.upgrade(), send.ready().await) {
                    self.renew(io, version);
                    return Ok(Sender { send, window, writer });
                }
                self.lost(&writer); // the node has said goodbye
            }
            let _held = self.connecting.lock().await;
            if self.live.borrow().is_some() {
                continue;
            }
            if self.tries.get() == tries {
                Box::pin(self.connect(io)).await; // apart: each request would have room for a handshake
            }
            if self.live.borrow().is_none() {
                break;
            }
        }
        let said = format!("{}: {}", self.target.address, self.last_error.borrow());
        Err(Failure::new(Code::UNAVAILABLE, said))
    }

    /// Keeps a stream of the connection that takes requests, once it has ended, until the next one is sent: to let go of
    /// it wakes the connection's task, which would have nothing else to do.
    pub fn stream_ended(&self, writer: &Coalesce<Socket>, out: SendStream<Bytes>, body: RecvStream) {
        let mut ended = self.ended.borrow_mut();
        let is_live = self.live.borrow().as_ref().is_some_and(|live| live.writer.is(writer));
        if is_live && ended.len() < ENDED {
            ended.push((out, body));
        }
    }

    /// Lets go of the streams that have ended. A connection that takes no more requests stays open for as long as they
    /// are kept.
    pub fn forget_ended(&self) {
        self.ended.borrow_mut().clear();
    }

    /// That connection takes no more requests.
    fn lost(&self, writer: &Coalesce<Socket>) {
        self.forget_ended();
        let mut live = self.live.borrow_mut();
        if live.as_ref().is_some_and(|live| live.writer.is(writer)) {
            live.take();
        }
    }

    /// Connects anew where certificates have changed. The connection that stands takes the calls until the new one does:
    /// a node may accept the old certificate and not the new one.
    fn renew(self: &Rc<Self>, io: &Io, version: u64) {
        let newest = self.target.tls.as_ref().map_or(0, |tls| tls.config.version());
        if newest == version || self.renewing.replace(true) {
            return;
        }
        let (node, common) = (self.clone(), io.common.clone());
        self.keep(spawn_local(async move {
            if node.connect_with(&common).await.is_err()
                && let Some(live) = &mut *node.live.borrow_mut()
            {
                live.version = newest; // not tried again until the certificates change once more
            }
            node.renewing.set(false);
        }));
    }

    async fn connect(self: &Rc<Self>, io: &Io) {
        if let Err(error) = self.connect_with(&io.common).await {
            self.last_error.replace(error);
        }
        self.tries.set(self.tries.get() + 1);
    }

    async fn connect_with(self: &Rc<Self>, common: &Arc<Common>) -> Result<(), String> {
        let patience = common.settings.connect_timeout();
        let version = self.target.tls.as_ref().map_or(0, |tls| tls.config.version());
        let window = Rc::new(Window::default());
        let made = Rc::downgrade(&window);
        let connected = timeout(patience, handshakes(&self.target, window, common)).await;
        let (send, writer, driver) =
            connected.map_err(|_| format!("it did not answer within {} ms", patience.as_millis()))??;
        self.live.replace(Some(Live { send, window: made, writer: writer.clone(), version }));
        self.forget_ended(); // of the connection before
        let node = Rc::downgrade(self);
        self.keep(spawn_local(async move {
            driver.await;
            if let Some(node) = node.upgrade() {
                node.lost(&writer);
            }
        }));
        Ok(())
    }

    fn keep(&self, task: tokio::task::JoinHandle<()>) {
        let mut tasks = self.tasks.borrow_mut();
        tasks.retain(|task| !task.is_finished());
        tasks.push(task.abort_handle());
    }
}

type Driver = Pin<Box<dyn Future<Output = ()>>>;

async fn open(target: &Target, unacknowledged: Option<Duration>) -> Result<Plain, String> {
    let said = |error: std::io::Error| error.to_string();
    let moving = match target.address.strip_prefix("unix:") {
        Some(path) => connect_unix(path).await,
        None => connect_tcp(&target.address).await,
    };
    let moving = moving.map_err(said)?;
    Plain::of(moving, unacknowledged).map_err(said)
}

async fn handshakes(
    target: &Target,
    window: Rc<Window>,
    common: &Arc<Common>,
) -> Result<(SendRequest<Bytes>, Coalesce<Socket>, Driver), String> {
    let plain = open(target, common.settings.unacknowledged_by_node()).await?;
    let wire = match &target.tls {
        Some(tls) => {
            let stream = TlsConnector::from(tls.config.get()).connect(tls.name.clone(), plain).await;
            let stream = stream.map_err(|error| format!("the TLS handshake failed: {error}"))?;
            Wire::Tls(Box::new(TlsStream::Client(stream)))
        }
        None => Wire::Plain(Box::new(plain.expect_server())),
    };
    let writer = Coalesce::new(Socket::new(wire), common.settings.body_timeout());
    let handshake = h2::client::Builder::new()
        .initial_window_size(SMALL)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(DECODED_HEADERS)
        // A day of cancelled calls must not end the connection; the node is ours.
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(None)
        .data_frame_budget(SMALL_FRAMES)
        .enable_push(false)
        .handshake(writer.clone());
    let mut handshake = pin!(handshake);
    let made = poll_fn(|cx| writer.poll_and_send(cx, |cx| handshake.as_mut().poll(cx))).await;
    let (send, connection) = made.map_err(|error| error.to_string())?;
    let driver = Box::pin(drive(writer.clone(), connection, window, common.clone()));
    Ok((send, writer, driver))
}

async fn drive(
    writer: Coalesce<Socket>,
    mut connection: Connection<Coalesce<Socket>, Bytes>,
    window: Rc<Window>,
    common: Arc<Common>,
) {
    let settings = &common.settings;
    let (keepalive, limit) = (settings.keepalive(), settings.keepalive_timeout());
    let mut signs = Signs::new(keepalive, limit, PING_SPACING, connection.ping_pong());
    let mut tick = pin!(sleep_until(signs.next()));
    loop {
        tokio::select! {
            biased;
            _ = poll_fn(|cx| writer.poll_and_send(cx, |cx| Pin::new(&mut connection).poll(cx))) => return,
            _ = window.wants_to_grow(&common.budget) => {
                window.grew(connection.set_initial_window_size(LARGE).is_ok());
            }
            _ = &mut tick => {
                let in_flight = Rc::strong_count(&window) > 1;
                if !signs.check(writer.was_heard(), in_flight) {
                    return; // and all that is in flight ends
                }
                tick.as_mut().reset(signs.next());
            }
        }
    }
}
