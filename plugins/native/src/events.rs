//! What Python is told: all that a turn of an I/O thread brought, under one hold of the interpreter.

use crate::attempt::Extras;
use crate::call::Call;
use crate::flag::Bell;
use crate::http::HttpCall;
use crate::http_body::{Body, Refusal};
use crate::io::{Io, Timed, begin_turn, end_turn};
use crate::python::{Exchange, HttpExchange, convert};
use bytes::Bytes;
use dl_inference_grpc::{Code, Failure, Frame};
use http::HeaderMap;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::task::Poll;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Events for which there is always room.
const KEPT: usize = 1024;

/// What Python is to be told.
pub enum Event {
    Begin(Rc<Call>),
    Ended {
        call: Rc<Call>,
        code: Code,
        callbacks: Vec<Py<PyAny>>,
    },
    /// An attempt has ended: `done([(context, error, trailers, seconds)])`.
    Done {
        done: Py<PyAny>,
        context: Py<PyAny>,
        error: Option<Raised>,
        trailers: HeaderMap,
        seconds: f64,
    },
    /// A call that belongs to no exchange has ended: `done(error, message, trailers)`.
    Called {
        done: Py<PyAny>,
        outcome: Result<(Frame, HeaderMap), Failure>,
    },
    /// A request of HTTP has come whole.
    BeginHttp(Rc<HttpCall>, Body),
    /// The service is to answer that a request of HTTP has failed.
    FailHttp(Rc<HttpCall>, Refusal),
    Callback(Py<PyAny>),
    /// `callback(message)`; None is the end of a stream.
    Message {
        callback: Py<PyAny>,
        message: Option<Frame>,
    },
    Timer(Timed),
    /// Have a function change a message; an error of its own comes back.
    Change {
        extras: Arc<Extras>,
        which: Which,
        message: Bytes,
        changed: oneshot::Sender<Result<Frame, Raised>>,
    },
    Offer {
        extras: Arc<Extras>,
        request: Bytes,
        answer: Bytes,
    },
    /// Objects of Python that are not needed any more: they are freed where the interpreter is held.
    Forget(#[allow(dead_code)] Py<PyAny>),
}

/// Which message a function of `Extras` changes.
#[derive(Clone, Copy)]
pub enum Which {
    Request,
    Answer,
}

/// Why an attempt failed.
pub enum Raised {
    Failure(Failure),
    ByPython(PyErr),
}

impl From<Failure> for Raised {
    fn from(failure: Failure) -> Raised {
        Raised::Failure(failure)
    }
}

impl From<PyErr> for Raised {
    fn from(error: PyErr) -> Raised {
        Raised::ByPython(error)
    }
}

/// Functions of the package's own that speak of errors and times.
#[derive(FromPyObject)]
pub struct Helpers {
    /// `(code, message, trailers) -> InferenceError`
    pub error_of: Py<PyAny>,
    /// `(error) -> (code, message, trailers)`
    pub status_of: Py<PyAny>,
    /// `(exception) -> InferenceError`: of one that a function of `Extras` raised.
    pub raised: Py<PyAny>,
    /// The `errors.Code`s, in the order of their numbers.
    pub codes: Vec<Py<PyAny>>,
    /// `(error or None)`: ends this process, which was forked from one that serves.
    pub end_child: Py<PyAny>,
    /// `(model, version, label) -> RoutingKey`
    pub key_of: Py<PyAny>,
    /// `time.monotonic`
    pub now: Py<PyAny>,
}

impl Helpers {
    /// UNKNOWN in the place of one that gRPC has not. None where Python has given no codes.
    fn code(&self, code: Code) -> Option<&Py<PyAny>> {
        let get = |code: Code| self.codes.get(usize::from(code.0));
        get(code).or_else(|| get(Code::UNKNOWN))
    }
}

/// The events that wait for the end of the turn.
#[derive(Default)]
pub struct Events {
    waiting: RefCell<Vec<Event>>,
    some: Bell,
}

impl Events {
    /// Has Python told, once this turn's work is done.
    pub fn tell(&self, event: Event) {
        self.waiting.borrow_mut().push(event);
        self.some.ring();
    }

    /// Returns once there are some, and the tasks that were ready meanwhile have had their turn: above all connections
    /// that have answers to send. `tokio::task::yield_now` would look for input too, with a system call.
    async fn some(&self) {
        let mut others_first = true;
        poll_fn(|cx| {
            if self.waiting.borrow().is_empty() {
                self.some.register(cx);
                return Poll::Pending;
            }
            if std::mem::take(&mut others_first) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }
}

/// Tells Python of events for as long as the thread lives.
pub async fn turns(io: Rc<Io>) {
    let (mut events, mut commands, mut sorted) = (vec![], vec![], Turn::default());
    loop {
        io.events.some().await;
        std::mem::swap(&mut *io.events.waiting.borrow_mut(), &mut events);
        begin_turn(commands);
        // None where the interpreter is shutting down: there is nobody to tell.
        Python::try_attach(|py| turn(&io, py, &mut events, &mut sorted));
        commands = end_turn();
        commands.drain(..).for_each(|command| io.take(command));
        empty(&mut events);
        empty(&mut commands);
    }
}

/// Keeps no more memory than usual turns need.
fn empty<T>(items: &mut Vec<T>) {
    items.clear();
    items.shrink_to(KEPT);
}

/// What of a turn goes to Python many at a time. One turn after the other uses it, so that none takes memory anew.
#[derive(Default)]
struct Turn {
    begun: Vec<Rc<Call>>,
    done: Vec<Done>,
    timers: Vec<Timed>,
    ended: Vec<(Rc<Call>, Code)>,
    /// Those that have ended before they begin.
    late: Vec<(Rc<Call>, Code)>,
}

/// What is called at the end of an attempt, and what it is told: context, error or None, trailers, seconds.
type Done = (Py<PyAny>, (Py<PyAny>, Py<PyAny>, Py<PyTuple>, f64));

/// Attempts and exchanges that have ended come first: they make room for those that begin. A timer comes after attempts
/// that have ended, which may cancel it.
fn turn(io: &Io, py: Python<'_>, events: &mut Vec<Event>, turn: &mut Turn) {
    for event in events.drain(..) {
        told(io, py, turn.take(io, py, event));
    }
    let mut attempts = turn.done.drain(..).peekable();
    while let Some((done, first)) = attempts.next() {
        let mut ended = vec![first];
        while let Some((_, next)) = attempts.next_if(|(next, _)| next.is(&done)) {
            ended.push(next);
        }
        told(io, py, done.call1(py, (ended,)).map(drop));
    }
    drop(attempts);
    for timed in turn.timers.drain(..) {
        let function = timed.lock().unwrap_or_else(PoisonError::into_inner).take();
        told(io, py, function.map_or(Ok(()), |function| function.call0(py).map(drop)));
    }
    tell_ended(io, py, &turn.ended);
    begin(io, py, &turn.begun);
    tell_ended(io, py, &turn.late);
    turn.empty();
}

impl Turn {
    /// Lets go of what was told of. Some of it may be objects of Python.
    fn empty(&mut self) {
        let Turn { begun, done, timers, ended, late } = self;
        empty(begun);
        empty(done);
        empty(timers);
        empty(ended);
        empty(late);
    }

    /// Keeps an event for later in the turn, or tells of it.
    fn take(&mut self, io: &Io, py: Python<'_>, event: Event) -> PyResult<()> {
        match event {
            Event::Begin(call) => self.begun.push(call),
            Event::Ended { call, code, callbacks } => {
                for callback in callbacks {
                    told(io, py, callback.call0(py).map(drop));
                }
                let list = if call.has_begun() { &mut self.ended } else { &mut self.late };
                list.push((call, code));
            }
            Event::Done { done, context, error, trailers, seconds } => {
                let helpers = &io.common.helpers;
                let error = match error {
                    None => py.None(),
                    Some(Raised::Failure(failure)) => convert::error(py, helpers, &failure)?,
                    Some(Raised::ByPython(error)) => helpers.raised.call1(py, (error.into_value(py),))?,
                };
                self.done.push((done, (context, error, convert::metadata(py, &trailers, true)?, seconds)));
            }
            Event::Timer(timed) => self.timers.push(timed),
            event => return tell(io, py, event),
        }
        Ok(())
    }
}

/// Follows each call into Python. What was raised has nobody to go to. Where Python has forked, this thread is a child's
/// only one: the child ends here, and never comes back to the runtime, which is its parent's.
fn told(io: &Io, py: Python<'_>, outcome: PyResult<()>) {
    if !io.outbox.is_of_this_process() {
        let error = outcome.err().map(|error| error.into_value(py));
        let _ = io.common.helpers.end_child.call1(py, (error,));
        std::process::abort(); // `end_child` does not return
    }
    if let Err(error) = outcome {
        error.write_unraisable(py, None);
    }
}

/// Calls `ended_all` for those that follow each other and are of one service.
fn tell_ended(io: &Io, py: Python<'_>, ended: &[(Rc<Call>, Code)]) {
    for these in ended.chunk_by(|(one, _), (next, _)| Rc::ptr_eq(&one.server, &next.server)) {
        let Some((first, _)) = these.first() else { continue };
        let pair = |(call, code): &(Rc<Call>, Code)| Some((call.take_exchange()?, io.common.helpers.code(*code)?));
        let pairs: Vec<_> = these.iter().filter_map(pair).collect();
        told(io, py, first.server.service.ended_all.call1(py, (pairs,)).map(drop));
    }
}

/// Calls `begin_all` for those that follow each other and are of one service.
fn begin(io: &Io, py: Python<'_>, calls: &[Rc<Call>]) {
    let mut clock = Clock::default();
    for these in calls.chunk_by(|one, next| Rc::ptr_eq(&one.server, &next.server)) {
        let Some(first) = these.first() else { continue };
        let make = |call: &Rc<Call>| {
            let deadline = call.deadline.map(|deadline| clock.read(io, py, deadline)).transpose()?;
            let exchange = Py::new(py, Exchange::new(py, call, io, deadline)?)?;
            call.begin(exchange.clone_ref(py));
            Ok(exchange)
        };
        let exchanges: PyResult<Vec<_>> = these.iter().map(make).collect();
        let begin_all = &first.server.service.begin_all;
        told(io, py, exchanges.and_then(|exchanges| begin_all.call1(py, (exchanges,)).map(drop)));
    }
}

fn begin_http(io: &Io, py: Python<'_>, call: &HttpCall, body: Body) -> PyResult<()> {
    let begin = if call.is_page { &call.service.begin_page } else { &call.service.begin };
    begin.call1(py, (http_exchange(io, py, call, Some(body))?,)).map(drop)
}

fn fail_http(io: &Io, py: Python<'_>, call: &HttpCall, refusal: Refusal) -> PyResult<()> {
    let (which, detail) = refusal.told();
    call.service.fail.call1(py, (http_exchange(io, py, call, None)?, which, detail)).map(drop)
}

/// The exchange of a request; `body` is used where it is made.
fn http_exchange(io: &Io, py: Python<'_>, call: &HttpCall, body: Option<Body>) -> PyResult<Py<HttpExchange>> {
    if let Some(exchange) = &*call.exchange.borrow() {
        return Ok(exchange.clone_ref(py));
    }
    let deadline = call.deadline.map(|deadline| Clock::default().read(io, py, deadline)).transpose()?;
    let exchange = Py::new(py, HttpExchange::new(py, io, call.shared.clone(), body, deadline))?;
    call.exchange.replace(Some(exchange.clone_ref(py)));
    Ok(exchange)
}

/// Times of Rust's monotonic clock on the clock of `time.monotonic`, whose zero Rust hides. Reads each clock once.
#[derive(Default)]
struct Clock(Option<(Instant, f64)>);

impl Clock {
    fn read(&mut self, io: &Io, py: Python<'_>, time: Instant) -> PyResult<f64> {
        let (instant, now) = match self.0 {
            Some(both) => both,
            None => {
                let now = io.common.helpers.now.call0(py)?.extract::<f64>(py)?;
                *self.0.insert((Instant::now(), now))
            }
        };
        Ok(now + time.saturating_duration_since(instant).as_secs_f64())
    }
}

fn tell(io: &Io, py: Python<'_>, event: Event) -> PyResult<()> {
    let helpers = &io.common.helpers;
    match event {
        Event::Begin(_) | Event::Ended { .. } | Event::Done { .. } | Event::Timer(_) | Event::Forget(_) => Ok(()),
        Event::Called { done, outcome } => match outcome {
            Ok((frame, trailers)) => {
                let trailers = convert::metadata(py, &trailers, true)?;
                done.call1(py, (py.None(), convert::message(py, frame.message())?, trailers)).map(drop)
            }
            Err(failure) => done.call1(py, (convert::error(py, helpers, &failure)?, py.None(), ())).map(drop),
        },
        Event::BeginHttp(call, body) => begin_http(io, py, &call, body),
        Event::FailHttp(call, refusal) => fail_http(io, py, &call, refusal),
        Event::Callback(callback) => callback.call0(py).map(drop),
        Event::Message { callback, message } => {
            let message = message.map(|frame| convert::message(py, frame.message())).transpose()?;
            callback.call1(py, (message,)).map(drop)
        }
        Event::Change { extras, which, message, changed } => {
            let _ = changed.send(extras.change(py, which, message, io.charge())); // else the attempt was cancelled
            Ok(())
        }
        Event::Offer { extras, request, answer } => extras.offer(py, request, answer),
    }
}
