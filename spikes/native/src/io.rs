//! An I/O thread: a runtime of its own, which takes commands from any thread and tells Python of events, all that a
//! turn brought in one hold of the GIL. What lives on the thread is in `Io`, and only this thread touches it.
//!
//! Threads: Python calls methods of `python.rs` on any thread; these send a command to the thread of the exchange and
//! return. Only `turns` calls Python, and it holds no borrow and no lock while it does.

use crate::client::{Ask, NodeHere, Target};
use crate::grpc::Failure;
use crate::python::{self, Exchange};
use crate::server::{Call, ServerHere, Service, Shared};
use bytes::Bytes;
use http::HeaderMap;
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::spawn_local;
use tokio::time::Instant;

pub type Outbox = mpsc::UnboundedSender<Command>;
/// What a timer is to call, until it is called or cancelled.
pub type Timed = Arc<Mutex<Option<Py<PyAny>>>>;

/// How an exchange is to end.
pub enum Answer {
    Ok { frame: Bytes, trailers: HeaderMap },
    Failed(Failure),
}

/// Functions of Python that see the messages of an attempt.
pub struct Extras {
    pub change_request: Option<Py<PyAny>>,
    pub change_answer: Option<Py<PyAny>>,
    /// `Sink.offer`.
    pub offer: Option<Py<PyAny>>,
}

pub struct Forward {
    pub exchange: Arc<Shared>,
    pub ask: Ask,
    pub done: Py<PyAny>,
    pub extras: Option<Box<Extras>>,
}

/// What any thread asks of an I/O thread.
pub enum Command {
    Serve { id: u64, service: Arc<Service>, listener: std::net::TcpListener },
    Drain { id: u64, grace: Duration, done: Py<PyAny> },
    Answer(u64, Answer),
    Answers(Vec<(u64, Answer)>),
    OnCancel(Arc<Shared>, Py<PyAny>),
    Forward(Box<Forward>),
    Call { ask: Box<Ask>, done: Py<PyAny> },
    Close { target: Arc<Target>, done: Py<PyAny> },
    Timer(Instant, Timed),
    Stop,
}

/// What Python is told.
pub enum Event {
    Begin(Rc<Call>),
    Ended {
        call: Rc<Call>,
        code: u16,
        callbacks: Vec<Py<PyAny>>,
    },
    /// An attempt has ended: `done(error, trailers, seconds)`.
    Done {
        done: Py<PyAny>,
        error: Option<Raised>,
        trailers: HeaderMap,
        seconds: f64,
        extras: Option<Box<Extras>>,
    },
    /// A call that belongs to no exchange has ended: `done(error, message, trailers)`.
    Called {
        done: Py<PyAny>,
        outcome: Result<(Bytes, HeaderMap), Failure>,
    },
    Callback(Py<PyAny>),
    Timer(Timed),
    /// Have a function change a message; an error of its own comes back.
    Change {
        function: Py<PyAny>,
        message: Bytes,
        changed: oneshot::Sender<Result<Bytes, PyErr>>,
    },
    Offer {
        offer: Py<PyAny>,
        request: Bytes,
        answer: Bytes,
    },
    Forget(#[allow(dead_code)] Py<PyAny>),
}

/// Why an attempt failed.
pub enum Raised {
    Failure(Failure),
    ByPython(PyErr),
}

/// Functions of the package's own that are needed to speak of errors.
pub struct Helpers {
    /// `(code, message, trailers) -> InferenceError`
    pub error_of: Py<PyAny>,
    /// `(error) -> (code, message, trailers)`
    pub status_of: Py<PyAny>,
    /// `(exception) -> InferenceError`: of one that a function of `Extras` raised.
    pub raised: Py<PyAny>,
    /// `errors.Code`, by number.
    pub codes: Vec<Py<PyAny>>,
    /// `time.monotonic`
    pub now: Py<PyAny>,
}

pub struct Io {
    pub index: usize,
    pub outbox: Outbox,
    pub helpers: Arc<Helpers>,
    pub calls: RefCell<HashMap<u64, Rc<Call>>>,
    pub servers: RefCell<HashMap<u64, Rc<ServerHere>>>,
    pub nodes: RefCell<HashMap<u64, Rc<NodeHere>>>,
    next: Cell<u64>,
    events: RefCell<Vec<Event>>,
    some: Notify,
}

thread_local! {
    /// Where this thread's commands go, if it is an I/O thread.
    static HERE: RefCell<Option<Outbox>> = const { RefCell::new(None) };
}

/// The outbox of the I/O thread that this is, if it is one of `outboxes`; else the first.
pub fn here_or_first(outboxes: &[Outbox]) -> Outbox {
    HERE.with_borrow(|here| match here {
        Some(here) if outboxes.iter().any(|each| each.same_channel(here)) => here.clone(),
        _ => outboxes[0].clone(),
    })
}

impl Io {
    /// Have Python told, once this turn's work is done.
    pub fn tell(&self, event: Event) {
        self.events.borrow_mut().push(event);
        self.some.notify_one();
    }

    pub fn next_id(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    async fn turns(self: Rc<Self>) {
        loop {
            self.some.notified().await;
            tokio::task::yield_now().await; // the other tasks that are ready come first
            let events = self.events.take();
            Python::attach(|py| self.turn(py, events));
        }
    }

    fn turn(&self, py: Python<'_>, events: Vec<Event>) {
        let (mut begun, mut late) = (vec![], vec![]);
        for event in events {
            match event {
                Event::Begin(call) => begun.push(call),
                Event::Ended { ref call, .. } if !call.has_begun() => late.push(event),
                event => self.told(py, event),
            }
        }
        self.begin(py, begun);
        for event in late {
            self.told(py, event);
        }
    }

    /// Calls `begin_all` once for each service.
    fn begin(&self, py: Python<'_>, mut calls: Vec<Rc<Call>>) {
        while let Some(first) = calls.first() {
            let service = first.server.service.clone();
            let (these, others): (Vec<_>, Vec<_>) =
                calls.into_iter().partition(|call| Arc::ptr_eq(&call.server.service, &service));
            let exchanges: Result<Vec<_>, _> =
                these.iter().map(|call| call.begin(Exchange::new(py, call, &self.outbox, &self.helpers), py)).collect();
            said(py, exchanges.and_then(|exchanges| service.begin_all.call1(py, (exchanges,)).map(|_| ())));
            calls = others;
        }
    }

    fn told(&self, py: Python<'_>, event: Event) {
        let told = match event {
            Event::Begin(_) => Ok(()),
            Event::Ended { call, code, callbacks } => {
                for callback in callbacks {
                    said(py, callback.call0(py).map(|_| ()));
                }
                let exchange = call.take_exchange();
                let code = self.helpers.codes.get(usize::from(code)).unwrap_or(&self.helpers.codes[2]); // UNKNOWN
                call.server.service.ended.call1(py, (exchange, code)).map(|_| ())
            }
            Event::Done { done, error, trailers, seconds, extras } => {
                drop(extras);
                let error = match error {
                    None => Ok(py.None()),
                    Some(Raised::Failure(failure)) => python::error(py, &self.helpers, &failure),
                    Some(Raised::ByPython(error)) => self.helpers.raised.call1(py, (error.into_value(py),)),
                };
                error.and_then(|error| done.call1(py, (error, python::metadata(py, &trailers)?, seconds)).map(|_| ()))
            }
            Event::Called { done, outcome } => match outcome {
                Ok((frame, trailers)) => python::metadata(py, &trailers).and_then(|trailers| {
                    done.call1(py, (py.None(), python::message(py, &frame)?, trailers)).map(|_| ())
                }),
                Err(failure) => python::error(py, &self.helpers, &failure)
                    .and_then(|error| done.call1(py, (error, py.None(), ())).map(|_| ())),
            },
            Event::Callback(callback) => callback.call0(py).map(|_| ()),
            Event::Timer(timed) => {
                let function = timed.lock().unwrap().take();
                function.map_or(Ok(()), |function| function.call0(py).map(|_| ()))
            }
            Event::Change { function, message, changed } => {
                let answer = python::message(py, &message)
                    .and_then(|message| function.call1(py, (message,)))
                    .and_then(|answer| python::frame_of(answer.bind(py)));
                let _ = changed.send(answer);
                Ok(())
            }
            Event::Offer { offer, request, answer } => python::message(py, &request)
                .and_then(|request| offer.call1(py, (request, python::message(py, &answer)?)).map(|_| ())),
            Event::Forget(_) => Ok(()),
        };
        said(py, told);
    }

    async fn commands(self: &Rc<Self>, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut commands = Vec::with_capacity(256);
        while inbox.recv_many(&mut commands, 256).await > 0 {
            for command in commands.drain(..) {
                match command {
                    Command::Serve { id, service, listener } => ServerHere::start(self, id, service, listener),
                    Command::Drain { id, grace, done } => {
                        let server = self.servers.borrow_mut().remove(&id);
                        let io = self.clone();
                        spawn_local(async move {
                            if let Some(server) = server {
                                server.drain(&io, grace).await;
                            }
                            io.tell(Event::Callback(done));
                        });
                    }
                    Command::Answer(id, answer) => self.answer(id, answer),
                    Command::Answers(answers) => {
                        for (id, answer) in answers {
                            self.answer(id, answer);
                        }
                    }
                    Command::OnCancel(exchange, callback) => self.on_cancel(&exchange, callback),
                    Command::Forward(forward) => crate::client::forward(self, *forward),
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
                    Command::Stop => return,
                }
            }
        }
    }

    fn call(&self, id: u64) -> Option<Rc<Call>> {
        self.calls.borrow().get(&id).cloned()
    }

    fn answer(&self, id: u64, answer: Answer) {
        if let Some(call) = self.call(id) {
            call.answer(self, answer);
        }
    }

    fn on_cancel(&self, exchange: &Shared, callback: Py<PyAny>) {
        match self.call(exchange.id) {
            Some(call) => call.on_cancel(self, callback),
            None if exchange.has_left() => self.tell(Event::Callback(callback)),
            None => self.tell(Event::Forget(callback)),
        }
    }
}

/// What Python raises has nobody to go to.
fn said(py: Python<'_>, told: PyResult<()>) {
    if let Err(error) = told {
        error.write_unraisable(py, None);
    }
}

/// Starts an I/O thread: where its commands go, and what ends with it.
pub fn start(index: usize, helpers: Arc<Helpers>) -> std::io::Result<(Outbox, std::thread::JoinHandle<()>)> {
    let (outbox, inbox) = mpsc::unbounded_channel();
    let own = outbox.clone();
    let body = move || {
        HERE.set(Some(own.clone()));
        let io = Rc::new(Io {
            index,
            outbox: own,
            helpers,
            calls: Default::default(),
            servers: Default::default(),
            nodes: Default::default(),
            next: Cell::new(0),
            events: Default::default(),
            some: Notify::new(),
        });
        match tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()) {
            Ok(runtime) => runtime.block_on(async {
                spawn_local(io.clone().turns());
                io.commands(inbox).await;
            }),
            Err(error) => eprintln!("an I/O thread has no runtime: {error}"),
        }
    };
    // Attached once around all, then detached: else each call into Python makes a thread state and frees it again.
    let body = move || Python::attach(|py| py.detach(body));
    Ok((outbox, std::thread::Builder::new().name(format!("native-io-{index}")).spawn(body)?))
}
