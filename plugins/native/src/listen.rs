//! Listening sockets, and the connections of clients on their way to an I/O thread.
//!
//! One I/O thread accepts for each listening socket, and hands a connection to the thread that has the fewest. So the
//! threads are loaded alike, which SO_REUSEPORT would leave to a hash, and a port belongs to one server alone.

use crate::call::End;
use crate::io::{Command, Io};
use crate::server::{self, Service};
use crate::socket::{Listener, MovingListener, MovingStream, Plain};
use dl_inference_grpc::{Code, Failure, Reason};
use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

/// The pause after an accept that failed: the process has no file left, perhaps.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a client whose calls have ended may take to close its connection, when the server drains.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long the statuses of calls that a drain has cancelled may take to go out.
const LAST_WORDS: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub enum Stage {
    Serving,
    Draining,
    Closed,
}

/// The part of a server that one I/O thread has.
pub struct ServerHere {
    id: u64,
    pub service: Arc<Service>,
    stage: watch::Sender<Stage>,
    /// Connections and listening sockets.
    open: Cell<usize>,
    /// Answers that go out as their clients read, and, while the server drains, connections that have more to write than
    /// their clients take.
    answering: Cell<usize>,
    none_left: Notify,
}

/// Counts for as long as it lives.
struct Open(Rc<ServerHere>);

impl Open {
    fn new(server: &Rc<ServerHere>) -> Open {
        server.open.set(server.open.get() + 1);
        Open(server.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get().saturating_sub(1));
        self.0.none_left.notify_one();
    }
}

/// Whether a connection, or one answer, waits for its client to read.
pub struct Answering(Rc<ServerHere>, Cell<bool>);

impl Answering {
    pub fn new(server: &Rc<ServerHere>) -> Answering {
        Answering(server.clone(), Cell::new(false))
    }

    pub fn set(&self, answering: bool) {
        let count = &self.0.answering;
        match (self.1.replace(answering), answering) {
            (false, true) => count.set(count.get() + 1),
            (true, false) => count.set(count.get() - 1),
            _ => {}
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl ServerHere {
    /// Takes nothing new, waits for the calls in flight and for clients that read their answers, cancels the rest.
    pub async fn drain(&self, io: &Io, grace: Duration) {
        self.stage.send_replace(Stage::Draining);
        let until = Instant::now() + grace;
        while timeout(GOODBYE.min(until - Instant::now()), self.until_none()).await.is_err() {
            if Instant::now() >= until || !(self.has_calls(io) || self.answering.get() > 0) {
                break;
            }
        }
        if self.open.get() > 0 {
            let calls: Vec<_> = io.calls.borrow().values().filter(|call| call.server.id == self.id).cloned().collect();
            for call in calls {
                call.end(io, End::Left(Some(Failure::new(Code::CANCELLED, "the server is shutting down"))));
            }
            let requests: Vec<_> =
                io.http_calls.borrow().values().filter(|call| call.server.id == self.id).cloned().collect();
            requests.iter().for_each(|call| call.cancel(io));
            let _ = timeout(LAST_WORDS, self.until_none()).await;
        }
        self.stage.send_replace(Stage::Closed);
        self.until_none().await;
    }

    fn has_calls(&self, io: &Io) -> bool {
        io.calls.borrow().values().any(|call| call.server.id == self.id)
            || io.http_calls.borrow().values().any(|call| call.server.id == self.id)
    }

    async fn until_none(&self) {
        while self.open.get() > 0 {
            self.none_left.notified().await;
        }
    }

    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }
}

/// Returns once the stage of a server is `wanted`, or a later one.
pub async fn reached(stage: &mut watch::Receiver<Stage>, wanted: Stage) {
    if stage.wait_for(|stage| *stage >= wanted).await.is_err() {
        pending::<()>().await;
    }
}

/// Begins a server's part on this thread.
pub fn serve(io: &Rc<Io>, id: u64, service: &Arc<Service>) {
    let server = Rc::new(ServerHere {
        id,
        service: service.clone(),
        stage: watch::Sender::new(Stage::Serving),
        open: Cell::new(0),
        answering: Cell::new(0),
        none_left: Notify::new(),
    });
    io.servers.borrow_mut().insert(id, server);
}

/// Accepts connections of a server that every thread knows.
pub fn listen(io: &Rc<Io>, id: u64, listeners: Vec<MovingListener>) {
    let Some(server) = io.servers.borrow().get(&id).cloned() else { return };
    for listener in listeners {
        match Listener::of(listener) {
            Ok(listener) => drop(spawn_local(accept(io.clone(), server.clone(), listener))),
            Err(error) => eprintln!("dl_inference_native: cannot listen: {error}"),
        }
    }
}

async fn accept(io: Rc<Io>, server: Rc<ServerHere>, listener: Listener) {
    let _open = Open::new(&server);
    let mut stage = server.stage();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = reached(&mut stage, Stage::Draining) => return,
            accepted = listener.accept() => accepted,
        };
        let Ok(stream) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let service = &server.service;
        if service.connected.fetch_add(1, Ordering::Relaxed) >= service.connections {
            service.connected.fetch_sub(1, Ordering::Relaxed);
            io.refused(Reason::Connections);
            continue;
        }
        let Some((index, count)) = service.by_thread.iter().enumerate().min_by_key(|(_, n)| n.load(Ordering::Relaxed))
        else {
            continue;
        };
        count.fetch_add(1, Ordering::Relaxed);
        if index == io.index {
            accepted_here(&io, &server, stream);
        } else if let Some(outbox) = io.common.outboxes.get(index) {
            outbox.send(Command::Accepted { id: server.id, service: service.clone(), stream });
        }
    }
}

/// Another thread has accepted a connection for this one.
pub fn accepted(io: &Rc<Io>, id: u64, service: &Arc<Service>, stream: MovingStream) {
    let server = io.servers.borrow().get(&id).cloned();
    match server {
        Some(server) => accepted_here(io, &server, stream),
        None => service.disconnected(io.index), // the server drains
    }
}

fn accepted_here(io: &Rc<Io>, server: &Rc<ServerHere>, stream: MovingStream) {
    let open = Open::new(server);
    let (io, server) = (io.clone(), server.clone());
    spawn_local(async move {
        if let Ok(plain) = Plain::of(stream, io.common.settings.unacknowledged_by_client()) {
            server::connection(&io, &server, plain).await;
        }
        server.service.disconnected(io.index);
        drop(open);
    });
}
