//! An I/O thread: a runtime of its own, which takes commands from any thread and tells Python of events. What lives on
//! the thread is in `Io`, and only this thread touches it.
//!
//! Threads: Python calls the methods of `python` on any thread; these send a command to the thread of the exchange and
//! return. Only `events` calls Python, and it holds no borrow and no lock while it does.

use crate::attempt::{self, Ask, Forward};
use crate::call::{Call, End, Shared};
use crate::events::{Event, Events, Helpers};
use crate::fork::Process;
use crate::http::{Answer, HttpCall, HttpShared};
use crate::ids::ById;
use crate::listen::{self, ServerHere};
use crate::node::NodeHere;
use crate::node::Target;
use crate::python::routing::Keys;
use crate::server::Service;
use crate::settings::Settings;
use crate::socket::{MovingListener, MovingStream};
use dl_inference_grpc::{Budget, Charge, Frame, Reason, Refusals, Timeouts};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::Instant;

/// Commands that one turn takes together.
const TOGETHER: usize = 256;

/// What a timer is to call, until it is called or cancelled.
pub type Timed = Arc<Mutex<Option<Py<PyAny>>>>;

/// What any thread asks of an I/O thread.
pub enum Command {
    Serve {
        id: u64,
        service: Arc<Service>,
    },
    Listen {
        id: u64,
        listeners: Vec<MovingListener>,
    },
    /// A client's connection, from the thread that has accepted it.
    Accepted {
        id: u64,
        service: Arc<Service>,
        stream: MovingStream,
    },
    Drain {
        id: u64,
        grace: Duration,
        done: Py<PyAny>,
    },
    End(u64, End),
    EndAll(Vec<(u64, End)>),
    OnCancel(Arc<Shared>, Py<PyAny>),
    EndHttp(u64, Box<Answer>),
    OnHttpCancel(Arc<HttpShared>, Py<PyAny>),
    OnMessage(u64, Py<PyAny>),
    OnWritable(u64, Py<PyAny>),
    Send(u64, Frame),
    Forward(Box<Forward>),
    Call {
        ask: Box<Ask>,
        done: Py<PyAny>,
    },
    Close {
        target: Arc<Target>,
        done: Py<PyAny>,
    },
    Timer(Instant, Timed),
    Stop,
}

/// Where the commands of an I/O thread go. Any thread.
#[derive(Clone)]
pub struct Outbox {
    sender: mpsc::UnboundedSender<Command>,
    process: Process,
}

impl Outbox {
    /// In the order in which threads call this. False, and no effect, where the thread has ended, or belongs to the
    /// process that this one was forked from.
    pub fn send_in_order(&self, command: Command) -> bool {
        self.is_of_this_process() && self.sender.send(command).is_ok()
    }

    /// As `send_in_order`. The I/O thread's own commands may overtake those of others.
    pub fn send(&self, command: Command) -> bool {
        if !self.is_of_this_process() {
            return false;
        }
        let left = HERE.with_borrow_mut(|here| match here {
            Some(Here { outbox, turn: Some(commands) }) if outbox.is(self) && !matches!(command, Command::Stop) => {
                commands.push(command);
                None
            }
            _ => Some(command),
        });
        left.is_none_or(|command| self.sender.send(command).is_ok())
    }

    pub fn is_of_this_process(&self) -> bool {
        self.process.is_this()
    }

    pub fn is(&self, other: &Outbox) -> bool {
        self.sender.same_channel(&other.sender)
    }
}

/// What the I/O threads of one transport share.
pub struct Common {
    pub helpers: Helpers,
    pub settings: Settings,
    pub budget: Arc<Budget>,
    pub refusals: Refusals,
    /// One for each I/O thread.
    pub outboxes: Vec<Outbox>,
}

pub struct Io {
    pub index: usize,
    pub outbox: Outbox,
    pub common: Arc<Common>,
    pub events: Events,
    pub calls: RefCell<ById<Rc<Call>>>,
    pub http_calls: RefCell<ById<Rc<HttpCall>>>,
    pub servers: RefCell<ById<Rc<ServerHere>>>,
    pub nodes: RefCell<ById<Rc<NodeHere>>>,
    pub keys: RefCell<Keys>,
    pub timeouts: RefCell<Timeouts>,
    next: Cell<u64>,
}

/// What an I/O thread knows of itself.
struct Here {
    outbox: Outbox,
    /// During a turn: the commands that Python gives this very thread, which it follows at the turn's end.
    turn: Option<Vec<Command>>,
}

thread_local! {
    /// None on all other threads.
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

/// Has this thread keep the commands that it gives itself, for `end_turn`.
pub fn begin_turn(room: Vec<Command>) {
    HERE.with_borrow_mut(|here| {
        if let Some(here) = here {
            here.turn = Some(room);
        }
    });
}

/// The commands that were kept.
pub fn end_turn() -> Vec<Command> {
    HERE.with_borrow_mut(|here| here.as_mut().and_then(|here| here.turn.take())).unwrap_or_default()
}

/// The outbox of the I/O thread that this is, if it is one of `outboxes`; else the first.
pub fn here_or_first(outboxes: &[Outbox]) -> Option<Outbox> {
    HERE.with_borrow(|here| match here {
        Some(Here { outbox, .. }) if outboxes.iter().any(|each| each.is(outbox)) => Some(outbox.clone()),
        _ => outboxes.first().cloned(),
    })
}

impl Io {
    fn new(index: usize, outbox: Outbox, common: Arc<Common>) -> Io {
        Io {
            index,
            outbox,
            common,
            events: Events::default(),
            calls: RefCell::default(),
            http_calls: RefCell::default(),
            servers: RefCell::default(),
            nodes: RefCell::default(),
            keys: RefCell::default(),
            timeouts: RefCell::default(),
            next: Cell::new(0),
        }
    }

    pub fn tell(&self, event: Event) {
        self.events.tell(event);
    }

    /// Counts that a client was refused.
    pub fn refused(&self, reason: Reason) {
        self.common.refusals.count(reason);
    }

    pub fn charge(&self) -> Charge {
        Charge::new(&self.common.budget)
    }

    pub fn next_id(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    fn call(&self, id: u64) -> Option<Rc<Call>> {
        self.calls.borrow().get(&id).cloned()
    }

    fn http_call(&self, id: u64) -> Option<Rc<HttpCall>> {
        self.http_calls.borrow().get(&id).cloned()
    }

    fn end_http(&self, id: u64, answer: Answer) {
        if let Some(call) = self.http_call(id) {
            call.end(self, answer);
        }
    }

    fn on_http_cancel(&self, exchange: &HttpShared, callback: Py<PyAny>) {
        match self.http_call(exchange.id) {
            Some(call) => call.on_cancel(self, callback),
            None if exchange.has_left() => self.tell(Event::Callback(callback)),
            None => self.tell(Event::Forget(callback)),
        }
    }

    /// Follows commands until one says to stop.
    async fn take_commands(self: &Rc<Self>, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut commands = Vec::with_capacity(TOGETHER);
        while inbox.recv_many(&mut commands, TOGETHER).await > 0 {
            for command in commands.drain(..) {
                match command {
                    Command::Stop => return,
                    command => self.take(command),
                }
            }
        }
    }

    pub fn take(self: &Rc<Self>, command: Command) {
        match command {
            Command::Serve { id, service } => listen::serve(self, id, &service),
            Command::Listen { id, listeners } => listen::listen(self, id, listeners),
            Command::Accepted { id, service, stream } => listen::accepted(self, id, &service, stream),
            Command::Drain { id, grace, done } => self.drain(id, grace, done),
            Command::End(id, end) => self.end(id, end),
            Command::EndAll(ends) => ends.into_iter().for_each(|(id, end)| self.end(id, end)),
            Command::OnCancel(exchange, callback) => match self.call(exchange.id) {
                Some(call) => call.on_cancel(self, callback),
                None if exchange.has_left() => self.tell(Event::Callback(callback)),
                None => self.tell(Event::Forget(callback)),
            },
            Command::EndHttp(id, answer) => self.end_http(id, *answer),
            Command::OnHttpCancel(exchange, callback) => self.on_http_cancel(&exchange, callback),
            Command::OnMessage(id, callback) => self.register(id, callback, Call::on_message),
            Command::OnWritable(id, callback) => self.register(id, callback, Call::on_writable),
            Command::Send(id, frame) => {
                if let Some(call) = self.call(id) {
                    call.send(frame);
                }
            }
            Command::Forward(forward) => attempt::forward(self, forward),
            Command::Call { ask, done } => {
                let io = self.clone();
                spawn_local(async move {
                    let outcome = ask.run(&io).await;
                    io.tell(Event::Called { done, outcome });
                });
            }
            Command::Close { target, done } => {
                if let Some(node) = self.nodes.borrow_mut().remove(&target.id) {
                    node.close();
                }
                self.tell(Event::Callback(done));
            }
            Command::Timer(at, timed) => {
                let io = self.clone();
                spawn_local(async move {
                    tokio::time::sleep_until(at).await;
                    io.tell(Event::Timer(timed));
                });
            }
            Command::Stop => {}
        }
    }

    fn drain(self: &Rc<Self>, id: u64, grace: Duration, done: Py<PyAny>) {
        let server = self.servers.borrow_mut().remove(&id);
        let io = self.clone();
        spawn_local(async move {
            if let Some(server) = server {
                server.drain(&io, grace).await;
            }
            io.tell(Event::Callback(done));
        });
    }

    fn register(&self, id: u64, callback: Py<PyAny>, register: impl FnOnce(&Call, &Io, Py<PyAny>)) {
        match self.call(id) {
            Some(call) => register(&call, self, callback),
            None => self.tell(Event::Forget(callback)),
        }
    }

    fn end(&self, id: u64, end: End) {
        if let Some(call) = self.call(id) {
            call.end(self, end);
        }
    }
}

fn run(io: Io, inbox: mpsc::UnboundedReceiver<Command>) {
    HERE.set(Some(Here { outbox: io.outbox.clone(), turn: None }));
    let io = Rc::new(io);
    match tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()) {
        Ok(runtime) => {
            runtime.block_on(async {
                spawn_local(crate::events::turns(io.clone()));
                io.take_commands(inbox).await;
            });
            // A name that is being looked up is not waited for: that may take a minute.
            runtime.shutdown_background();
        }
        Err(error) => eprintln!("dl_inference_native: an I/O thread cannot run: {error}"),
    }
}

struct Running {
    process: Process,
    outbox: Outbox,
    thread: JoinHandle<()>,
}

/// All I/O threads of this process that have not been joined. Only threads that are attached to the interpreter lock it,
/// and a fork is made by such a thread too: a child never finds it locked.
static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());

/// Starts the I/O threads of a transport.
pub fn start(helpers: Helpers, settings: Settings) -> std::io::Result<Arc<Common>> {
    let process = Process::this();
    let (outboxes, inboxes): (Vec<_>, Vec<_>) = (0..settings.threads.max(1))
        .map(|_| mpsc::unbounded_channel())
        .map(|(sender, inbox)| (Outbox { sender, process }, inbox))
        .unzip();
    let budget = Budget::new(settings.buffer_mb << 20);
    let common = Arc::new(Common { helpers, settings, budget, refusals: Refusals::default(), outboxes });
    for ((index, inbox), outbox) in inboxes.into_iter().enumerate().zip(&common.outboxes) {
        let (outbox, common) = (outbox.clone(), common.clone());
        let ending = outbox.clone();
        // The thread is attached to the interpreter once, around its whole loop, and detached within: else each call
        // into Python would make a thread state and free it again.
        let body = move || {
            Python::try_attach(|py| py.detach(move || run(Io::new(index, outbox, common), inbox)));
        };
        let thread = std::thread::Builder::new().name(format!("native-io-{index}")).spawn(body)?;
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|each| each.process.is_this() && !each.thread.is_finished());
        running.push(Running { process, outbox: ending, thread });
    }
    Ok(common)
}

/// Has the I/O threads of a transport end, and does not wait for it.
pub fn stop(common: &Common) {
    for outbox in &common.outboxes {
        outbox.send(Command::Stop);
    }
}

/// Ends all I/O threads of this process, and waits until they have ended, for `patience` at most. The interpreter is
/// free meanwhile. False if one has not ended.
pub fn stop_all(py: Python<'_>, patience: Duration) -> bool {
    let mut running = std::mem::take(&mut *RUNNING.lock().unwrap_or_else(PoisonError::into_inner));
    running.retain(|each| each.process.is_this());
    for each in &running {
        each.outbox.send(Command::Stop);
    }
    py.detach(|| {
        let until = std::time::Instant::now() + patience;
        for each in running {
            while !each.thread.is_finished() {
                if std::time::Instant::now() > until {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = each.thread.join(); // a panic of it was printed
        }
        true
    })
}
