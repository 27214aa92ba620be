//! The load: of each request in flight a task, which sends the next request once it has the answer.

use crate::answer::Answer;
use crate::options::{Amount, Options};
use crate::report::{Phase, Report};
use crate::schedule::Schedule;
use crate::tally::{Outcome, Tally};
use crate::tls::Tls;
use crate::{bodies, connection, status};
use anyhow::bail;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, StatusCode};
use rustix::time::{ClockId, clock_gettime};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

/// How often it is looked whether answers come, at the least.
const LOOK: Duration = Duration::from_secs(1);

/// What is sent, and what is expected.
pub struct Traffic {
    head: Request<()>,
    messages: Vec<Bytes>,
    answers: Option<Vec<Bytes>>,
    sent: Cell<usize>,
}

impl Traffic {
    /// `answers`, if any, are as many as `messages`.
    pub fn new(head: Request<()>, messages: &[Bytes], answers: Option<Vec<Bytes>>) -> Self {
        let messages = messages.iter().map(|message| bodies::framed(message)).collect();
        Traffic { head, messages, answers, sent: Cell::new(0) }
    }

    /// The number of the next message: each in turn.
    fn next(&self) -> usize {
        let number = self.sent.get();
        self.sent.set((number + 1) % self.messages.len());
        number
    }

    fn answer(&self, number: usize) -> Option<&[u8]> {
        self.answers.as_ref().map(|answers| &*answers[number])
    }
}

/// The warm-up, then what is measured.
pub async fn run(options: &Options, traffic: Traffic) -> anyhow::Result<Report> {
    let tls = options.ca.as_deref().map(Tls::new).transpose()?;
    let mut senders = vec![];
    for _ in 0..options.connections {
        senders.push(connection::open(&options.address, tls.as_ref()).await?);
    }
    let traffic = Rc::new(traffic);
    let warm_up = Amount::Time(Duration::from_secs_f64(options.warm_up));
    let (begun, tally) = phase(options, &senders, &traffic, warm_up).await?;
    let warm_up = Phase::new(begun, tally);
    let cpu = cpu_time();
    let (begun, tally) = phase(options, &senders, &traffic, options.amount()).await?;
    let cpu = cpu_time().saturating_sub(cpu);
    if options.rate.is_none() {
        check_streams(options, &senders)?;
    }
    Ok(Report::new(begun, tally, cpu, warm_up))
}

/// CPU of this process so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Fails where the server has had requests wait in this process.
fn check_streams(options: &Options, senders: &[SendRequest<Bytes>]) -> anyhow::Result<()> {
    let each = options.in_flight.div_ceil(options.connections) as usize;
    let most = senders.iter().map(SendRequest::current_max_send_streams).min().unwrap_or(each);
    if most < each {
        bail!("the server takes {most} requests on a connection; {each} were to be in flight: use more --connections");
    }
    Ok(())
}

/// One phase, and when it began. It ends with the answer to its last request.
async fn phase(
    options: &Options,
    senders: &[SendRequest<Bytes>],
    traffic: &Rc<Traffic>,
    amount: Amount,
) -> anyhow::Result<(Instant, Tally)> {
    let schedule = Schedule::new(amount, options.rate)?;
    let begun = schedule.begun();
    let shared = Rc::new(Shared {
        traffic: Rc::clone(traffic),
        schedule: Mutex::new(schedule),
        tally: RefCell::new(Tally::new()?),
        in_flight: Cell::new(0),
    });
    let mut places = JoinSet::new();
    for sender in senders.iter().cycle().take(options.in_flight as usize) {
        places.spawn_local(Rc::clone(&shared).keep_sending(sender.clone()));
    }
    tokio::select! {
        biased;
        stalled = shared.stalled(Duration::from_secs_f64(options.stall)) => bail!(stalled),
        ended = all(places) => ended?,
    }
    let tally = shared.tally.replace(Tally::new()?);
    Ok((begun, tally))
}

async fn all(mut places: JoinSet<io::Result<()>>) -> anyhow::Result<()> {
    while let Some(place) = places.join_next().await {
        place??;
    }
    Ok(())
}

/// What the requests of one phase share.
struct Shared {
    traffic: Rc<Traffic>,
    /// One waits for the next request to be due, the others for it.
    schedule: Mutex<Schedule>,
    tally: RefCell<Tally>,
    in_flight: Cell<usize>,
}

impl Shared {
    /// One request after another, until there is none left or the connection is lost.
    async fn keep_sending(self: Rc<Self>, mut sender: SendRequest<Bytes>) -> io::Result<()> {
        let mut failed = false;
        while let Some(due) = self.due().await? {
            let number = self.traffic.next();
            self.in_flight.set(self.in_flight.get() + 1);
            let ready = poll_fn(|cx| sender.poll_ready(cx)).await;
            let lost = ready.is_err();
            let outcome = match ready {
                Ok(()) => self.exchange(&mut sender, number).await,
                Err(error) => Err(error.to_string()),
            };
            self.in_flight.set(self.in_flight.get() - 1);
            // Where the loss has ended a request, that is what counts, and not the request that cannot follow.
            if !(lost && failed) {
                failed = outcome.is_err();
                self.tally.borrow_mut().add(number, due, outcome);
            }
            if lost {
                break;
            }
        }
        Ok(())
    }

    /// A function of its own, as the lock in the head of a loop would be held throughout the loop.
    async fn due(&self) -> io::Result<Option<Instant>> {
        self.schedule.lock().await.next().await
    }

    /// Sends a message and reads its answer. `Err` describes an answer that is missing or malformed.
    async fn exchange(&self, sender: &mut SendRequest<Bytes>, number: usize) -> Result<Outcome, String> {
        let (response, mut body) = sender.send_request(self.traffic.head.clone(), false).map_err(text)?;
        // h2 keeps what the server's window has no room for yet; the bytes are those of `messages`, so nothing grows.
        body.send_data(self.traffic.messages[number].clone(), true).map_err(text)?;
        let (head, mut body) = response.await.map_err(text)?.into_parts();
        if head.status != StatusCode::OK {
            return Err(format!("an answer has the HTTP status {}", head.status));
        }
        let mut answer = Answer::new(self.traffic.answer(number));
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(text)?;
            body.flow_control().release_capacity(chunk.len()).map_err(text)?;
            answer.take(&chunk);
        }
        let trailers = body.trailers().await.map_err(text)?;
        // An answer without a message may have its trailers in its only headers.
        let code = status::code(trailers.as_ref().unwrap_or(&head.headers))?;
        Ok(Outcome { code, matches: code != 0 || answer.finish()? })
    }

    /// Returns what is wrong once no answer has come for so long though requests are in flight.
    async fn stalled(&self, patience: Duration) -> String {
        let (mut answered, mut since) = (0, Instant::now());
        loop {
            tokio::time::sleep(LOOK.min(patience)).await;
            let (now, in_flight) = (self.tally.borrow().answered(), self.in_flight.get());
            if in_flight == 0 || now != answered {
                (answered, since) = (now, Instant::now());
            } else if since.elapsed() >= patience {
                return format!("{in_flight} requests are in flight, and no answer has come for {patience:?}");
            }
        }
    }
}

fn text(error: h2::Error) -> String {
    error.to_string()
}
