"""Words and sentence patterns of the demo data set made by ``make_demo_data.py``.

Every block is plain text: slot values are separated by ``;`` or line breaks, patterns stand one
a line. A name in braces, such as ``{city}``, is filled with a value of that slot. ``{clause}``
stands for a request of some other intent, ``{x}`` for a withdrawn and ``{y}`` for a wanted one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """Sentence patterns of one intent, by what a reader needs in order to recognise it.

    Attributes:
        label: Name of the intent.
        easy: Plain requests with a giveaway word. All are bare verb phrases ("set an alarm"), so
            they can also stand inside a longer sentence.
        medium: Questions and looser wordings.
        indirect: Sentences that only hint at the request, with no word typical of the intent.
        wrappers: Requests of this intent around a ``{clause}`` of another one.
    """

    label: str
    easy: tuple[str, ...]
    medium: tuple[str, ...]
    indirect: tuple[str, ...]
    wrappers: tuple[str, ...]


@dataclass(frozen=True)
class Shared:
    """A pattern that people use for several intents alike, so no model can be sure of it."""

    pattern: str
    labels: tuple[str, ...]


def _values(block: str) -> tuple[str, ...]:
    parts = (part.strip() for part in re.split(r"[;\n]", block))
    return tuple(part for part in parts if part)


def _lines(block: str) -> tuple[str, ...]:
    lines = (line.strip() for line in block.splitlines())
    return tuple(line for line in lines if line)


SLOTS: dict[str, tuple[str, ...]] = {
    "genre": _values("""
        jazz; rock; classical music; hip hop; country; techno; folk music; blues; reggae; soul
        ambient; heavy metal; salsa; bossa nova; punk; disco; gospel; swing; indie pop; funk
        baroque; trance; bluegrass; lo-fi beats; drum and bass
    """),
    "artist": _values("""
        the paper lanterns; nina holloway; copper river; the quiet engines; lola marchetti
        silver arcade; duke ellery; the night porters; mara velvet; old harbour choir
        samuel okoro; the blue umbrellas; city of foxes; ines duarte; the broken clocks
        velvet sunday; kenji arata; the lighthouse keepers; rosa linden; winter parade
        the alarm bells; stormy weather club; kitchen table quartet; the messengers
        monday calendar
    """),
    "song": _values("""
        here comes the rain; wake me at dawn; turn the lights down low; message in the sand
        ten minutes more; the long way home; dinner for two; summer storm; call me tomorrow
        cold as january; stop the clocks; shopping in the dark; the kitchen song; remember me
        dancing on the roof; blue window; paper boats; river of gold; silent avenue; last train
        laughing all the way; red lantern; a table by the sea; midnight appointment; warm hands
    """),
    "playlist": _values("""
        workout; dinner party; road trip; study; sleep; morning coffee; rainy day; summer hits
        focus; throwback; cooking; yoga; sunday brunch; running; bedtime; cleaning; garden party
        barbecue; deep work; first dance
    """),
    "city": _values("""
        paris; london; berlin; madrid; oslo; chicago; tokyo; lisbon; vienna; toronto; dublin
        rome; prague; boston; seattle; sydney; athens; warsaw; denver; cairo; mumbai; nairobi
        lyon; helsinki; glasgow; porto; seoul; austin; zurich; geneva; bristol; naples; montreal
        brussels; krakow
    """),
    "day": _values("""
        today; tomorrow; tonight; this weekend; next week; this friday; next monday; this evening
        tomorrow morning; saturday night; next tuesday; this afternoon; wednesday morning
        sunday afternoon; thursday; monday evening; the day after tomorrow; later this week
        friday night; early next week
    """),
    "time": _values("""
        six; seven thirty; half past five; 8 am; noon; quarter to nine; ten o'clock; 6:45
        five in the morning; 7 pm; a quarter past six; eight fifteen; 4:30; midnight; eleven
        twenty past seven; 9 am; half six; three in the afternoon; 5:20; two; ten to eight; 10:30
        1 pm; nine sharp
    """),
    "duration": _values("""
        ten minutes; five minutes; half an hour; 20 minutes; an hour; ninety seconds; two hours
        forty five minutes; 3 minutes; a quarter of an hour; twelve minutes; one minute
        thirty seconds; 25 minutes; an hour and a half; fifteen minutes; seven minutes
        fifty minutes; 8 minutes; three quarters of an hour
    """),
    "person": _values("""
        mum; dad; anna; my sister; tom; my boss; grandma; dr patel; lucy; my wife; my brother
        james; the landlord; priya; uncle joe; carlos; my neighbour; emma; the plumber; yusuf
        my husband; olga; coach rivera; ben; my flatmate; hannah; the babysitter; aunt mei; leo
        my cousin
    """),
    "news": _values("""
        i'm running late; dinner is ready; the train is delayed; i'll be home soon; we won the game
        happy birthday; the meeting is moved; i miss you; the parcel arrived; it's raining here
        i left the keys outside; the concert was great; i can't find the restaurant
        the kitchen light is broken; i set the alarm already; we need more milk; the joke was awful
        the heating is fixed; i'm at the station; it is too hot in the office; see you there
        the timer went off; i forgot the calendar; the song was lovely; traffic is terrible
    """),
    "meeting": _values("""
        dentist appointment; team meeting; lunch with the client; parent teacher evening; haircut
        yoga class; budget review; job interview; piano lesson; birthday party; project kickoff
        doctor's visit; book club; football practice; weekly catch up; driving test; eye test
        wedding rehearsal; product demo; physio session; school play; choir rehearsal
        weather briefing; kitchen inspection; message training
    """),
    "room": _values("""
        kitchen; bedroom; living room; hallway; bathroom; garage; study; dining room; porch; attic
        basement; nursery; office; guest room; landing; laundry room; conservatory; garden shed
        playroom; stairwell
    """),
    "degrees": _values("""
        twenty degrees; 21 degrees; eighteen degrees; 19; twenty two; 23 degrees; 68; seventy
        sixteen degrees; 20.5; seventeen; 65 degrees; twenty four; 18.5 degrees; 72
    """),
    "place": _values("""
        the airport; the train station; the nearest pharmacy; work; the city museum; the stadium
        the post office; my sister's house; the central library; the hospital; the beach; home
        the shopping centre; the concert hall; the nearest petrol station; the zoo; the old harbour
        the swimming pool; the university; the town hall; the cinema; the botanical garden
        the bus depot; the ski slope; the farmers market
    """),
    "cuisine": _values("""
        italian; thai; indian; mexican; japanese; greek; vegan; chinese; lebanese; french; korean
        ethiopian; vietnamese; spanish; turkish; seafood; peruvian; moroccan; polish; nepalese
    """),
    "restaurant": _values("""
        the golden fork; casa lucia; blue basil; the hungry whale; noodle corner; la petite cour
        the olive press; saffron house; mama rosa; the oyster shed; red pepper; bamboo garden
        the corner grill; taverna nikos; spice route; the music box cafe; alarm clock diner
        thunder and rain; the timer; sunny side; the messenger; lamp and lantern; chez henri
        sakura; the joker
    """),
    "people": _values("two; four; six people; three; eight; five of us; a party of ten; seven"),
    "item": _values("""
        milk; eggs; bread; butter; olive oil; bananas; toilet paper; coffee; rice; onions; cheese
        washing powder; light bulbs; batteries; guitar strings; birthday candles; egg timers
        umbrellas; sun cream; apples; pasta; yoghurt; dog food; tomatoes; chocolate; tea bags
        alarm clocks; wall calendars; printer paper; garlic; oat milk; kitchen towels
        joke books; lemons; shampoo; sparkling water; honey; frozen peas; cinnamon; road maps
    """),
    "topic": _values("""
        cats; lawyers; the weather; elephants; computers; musicians; alarm clocks; cows; doctors
        waiters; chickens; light bulbs; traffic; penguins; calendars; pirates; teachers; robots
        bananas; text messages; skeletons; thermostats; vampires; plumbers; ducks
    """),
    "task": _values("""
        water the plants; take my pills; call the bank; pay the rent; feed the cat; practise violin
        play the piano; pick up the kids; take out the bins; buy a birthday present; renew my pass
        iron a shirt; read the weather report; send the invoice; book the holiday; charge my phone
        turn off the oven; change the light bulb; look for the joke book; add up the receipts
        walk the dog; defrost the chicken; stop at the bakery; text the landlord; check the heating
        return the library books; back up the photos; clean the fridge; wrap the gifts; stretch
    """),
    "thing": _values("""
        alarm; timer; music; reminder; meeting; song; reservation; route; message; heating
        playlist; event; navigation; countdown
    """),
}

INTENTS: tuple[Intent, ...] = (
    Intent(
        label="play_music",
        easy=_lines("""
            play some {genre}
            play {song} by {artist}
            play my {playlist} playlist
            put on some music by {artist}
            shuffle songs by {artist}
            play the album by {artist}
        """),
        medium=_lines("""
            put on {artist}
            put {song} on
            i want to hear {song}
            i'm in the mood for {genre}
            have you got anything by {artist}
            some {genre} in the {room}
            start {playlist} from the top
        """),
        indirect=_lines("""
            it's far too quiet in the {room}
            we need something to dance to {day}
            i have {song} stuck in my head
            nothing beats {artist} on a day like this
            {artist} would go well with dinner {day}
        """),
        wrappers=_lines("""
            play the one called {clause}
            put on something loud so nobody hears me {clause}
            give me a tune while the others {clause}
            i want to hear {song} every time people {clause}
        """),
    ),
    Intent(
        label="get_weather",
        easy=_lines("""
            tell me the weather in {city}
            check the weather forecast for {day}
            give me the weather report for {city}
            tell me if it will rain {day}
            find out how sunny it gets in {city} {day}
        """),
        medium=_lines("""
            is it going to snow in {city}
            how hot is it in {city} {day}
            what's it like outside {day}
            will it stay dry {day}
            what are the chances of a storm {day}
            how windy is it in {city}
        """),
        indirect=_lines("""
            do i need an umbrella {day}
            should i take a coat to {city}
            can i wear shorts {day}
            is it worth washing the car {day}
            can we sit outside in {city} {day}
            do i have to cover the plants {day}
        """),
        wrappers=_lines("""
            will it be dry when i {clause}
            how cold is it going to get while they {clause}
            is it raining, i want to know before i {clause}
            what's the sky like {day}, we have to {clause}
        """),
    ),
    Intent(
        label="set_alarm",
        easy=_lines("""
            set an alarm for {time}
            set my alarm to {time} {day}
            wake me up at {time}
            create an alarm for {time} {day}
            set a wake up alarm for {day}
        """),
        medium=_lines("""
            i have to be up by {time}
            get me out of bed at {time}
            alarm {time} please
            make sure i'm awake at {time} {day}
            ring at {time} {day}
        """),
        indirect=_lines("""
            i can't sleep past {time} {day}
            my train goes at {time} and i always oversleep
            don't let me lie in {day}
            i want to see the sunrise {day} but i never hear my phone
            no snoring after {time} {day}
        """),
        wrappers=_lines("""
            get me up at {time} because i have to {clause}
            wake me at {time} so that i can {clause}
            i need to be out of bed by {time} to {clause}
            ring at {time} or i will never {clause}
        """),
    ),
    Intent(
        label="set_timer",
        easy=_lines("""
            set a timer for {duration}
            start a timer lasting {duration}
            start a countdown of {duration}
            set the kitchen timer to {duration}
            start the timer
        """),
        medium=_lines("""
            count down {duration}
            time me for {duration}
            {duration} on the clock
            give me {duration} starting now
            beep in {duration}
        """),
        indirect=_lines("""
            the eggs need exactly {duration}
            let me know when {duration} are over
            the pizza has to come out in {duration}
            i want to hold this pose for {duration}
            {duration} and not a second longer for this tea
        """),
        wrappers=_lines("""
            count down {duration}, then i will {clause}
            give me {duration} from now before i {clause}
            beep after {duration} so i know when to {clause}
            time {duration} while the kids {clause}
        """),
    ),
    Intent(
        label="set_reminder",
        easy=_lines("""
            remind me to {task}
            set a reminder to {task} {day}
            remind me at {time} to {task}
            create a reminder for {day}
            remind me about the {meeting}
        """),
        medium=_lines("""
            don't let me forget to {task}
            give me a nudge {day} to {task}
            make sure i {task} {day}
            i must remember to {task} at {time}
            tell me at {time} to {task}
        """),
        indirect=_lines("""
            i always forget to {task}
            somehow i never manage to {task}
            my memory is awful and i should {task} {day}
            last time it slipped my mind to {task}
            i would hate it if i didn't {task} {day}
        """),
        wrappers=_lines("""
            remind me to {clause}
            {day} i must not forget to {clause}
            poke me at {time} to {clause}
            make sure it doesn't slip my mind to {clause}
            tell me later that i wanted to {clause}
        """),
    ),
    Intent(
        label="send_message",
        easy=_lines("""
            text {person} that {news}
            send a message to {person}
            send {person} a text saying {news}
            message {person} that {news}
            write a message to {person} about the {meeting}
        """),
        medium=_lines("""
            let {person} know that {news}
            tell {person} {news}
            drop {person} a line
            ask {person} about {day}
            say to {person} that {news}
        """),
        indirect=_lines("""
            {person} should hear that {news}
            {person} doesn't know yet that {news}
            could someone inform {person} about {day}
            {person} is waiting to hear from me
            i owe {person} an answer about the {meeting}
        """),
        wrappers=_lines("""
            tell {person} to {clause}
            let {person} know i will {clause}
            ask {person} whether we should {clause}
            say to {person} please {clause}
            write to {person} and say {clause}
        """),
    ),
    Intent(
        label="check_calendar",
        easy=_lines("""
            check my calendar for {day}
            show my schedule for {day}
            read out my appointments for {day}
            tell me which meetings i have {day}
            list the events in my calendar {day}
        """),
        medium=_lines("""
            what have i got planned {day}
            am i free {day}
            when is the {meeting}
            do i have anything on at {time} {day}
            what does {day} look like for me
        """),
        indirect=_lines("""
            can i fit in a {meeting} {day}
            how busy am i {day}
            is there room for lunch with {person} {day}
            did i promise {person} anything for {day}
            could i leave at {time} {day} without missing anything
        """),
        wrappers=_lines("""
            when was i supposed to {clause}
            which day did we say we would {clause}
            am i free {day} to {clause}
            do i have anything on {day} or can i {clause}
        """),
    ),
    Intent(
        label="create_event",
        easy=_lines("""
            schedule a {meeting} for {day}
            add the {meeting} to my calendar
            create an event for the {meeting} {day}
            put the {meeting} in my calendar for {day}
            schedule a meeting with {person} at {time}
        """),
        medium=_lines("""
            pencil in the {meeting} for {day}
            block {duration} {day} for the {meeting}
            note down {meeting} at {time} {day}
            invite {person} to the {meeting} {day}
            arrange a {meeting} with {person}
        """),
        indirect=_lines("""
            {person} and i agreed on {day} at {time}
            the {meeting} will now be {day} at {time}
            keep {day} clear, it's the {meeting}
            i've just been given a {meeting} {day}
            the {meeting} is happening {day}, save the date
        """),
        wrappers=_lines("""
            block {day} so that i can {clause}
            pencil in {duration} {day} to {clause}
            reserve a slot at {time} {day} to {clause}
            keep {day} clear in the diary, we are going to {clause}
        """),
    ),
    Intent(
        label="lights_on",
        easy=_lines("""
            turn on the {room} lights
            switch the lights on in the {room}
            turn the {room} lamp on
            switch on all the lights
            turn the light on in the {room}
        """),
        medium=_lines("""
            light up the {room}
            lights in the {room} please
            make the {room} brighter
            can we have some light in the {room}
            illuminate the {room}
        """),
        indirect=_lines("""
            i can't see a thing in the {room}
            it's pitch dark in the {room}
            i keep bumping into things in the {room}
            nobody can read in the {room} like this
            the {room} is too gloomy {day}
        """),
        wrappers=_lines("""
            make the {room} bright so i can {clause}
            it's too dark in the {room} to {clause}
            i need to see something in the {room} before i {clause}
            let there be light in the {room} while we {clause}
        """),
    ),
    Intent(
        label="lights_off",
        easy=_lines("""
            turn off the {room} lights
            switch the lights off in the {room}
            turn the {room} lamp off
            switch off all the lights
            turn the light off in the {room}
        """),
        medium=_lines("""
            make the {room} dark
            kill the lights in the {room}
            no more light in the {room}
            lights out in the {room}
            put the {room} lamp out
        """),
        indirect=_lines("""
            it's way too bright in the {room}
            the glare in the {room} hurts my eyes
            i can't fall asleep with the {room} lit up
            we are wasting electricity in the empty {room}
            the {room} should be pitch black for the film
        """),
        wrappers=_lines("""
            make the {room} dark so i can {clause}
            it's too bright in the {room} to {clause}
            lights out in the {room} before you {clause}
            i want it pitch black in the {room} while we {clause}
        """),
    ),
    Intent(
        label="set_temperature",
        easy=_lines("""
            set the thermostat to {degrees}
            turn the heating up in the {room}
            set the temperature to {degrees}
            turn down the heating in the {room}
            heat the {room} to {degrees}
        """),
        medium=_lines("""
            make it warmer in the {room}
            cool the {room} down a bit
            i want the {room} at {degrees}
            take the {room} down to {degrees}
            make the {room} {degrees} by {time}
        """),
        indirect=_lines("""
            i'm freezing in the {room}
            it's like an oven in the {room}
            my feet are like ice in the {room}
            we are all sweating in the {room}
            the {room} is too chilly for {person}
        """),
        wrappers=_lines("""
            make the {room} warmer while i {clause}
            it's too cold in the {room} to {clause}
            bring the {room} to {degrees} before i {clause}
            i want the {room} cooler when the guests {clause}
        """),
    ),
    Intent(
        label="get_directions",
        easy=_lines("""
            navigate to {place}
            give me directions to {place}
            find the fastest route to {place}
            start navigation to {city}
            show me the way to {place}
        """),
        medium=_lines("""
            how do i get to {place}
            take me to {place}
            which bus goes to {place}
            how far is it to {place} from here
            i want to drive to {city} {day}
        """),
        indirect=_lines("""
            i'm lost and i should be at {place} by {time}
            i've never been to {place} before
            where on earth is {place}
            {person} is waiting for me at {place} and i don't know these streets
            did i miss the turn for {place}
        """),
        wrappers=_lines("""
            how do i get to {place}, i have to {clause}
            take me to {place} where i can {clause}
            which road leads to {place}, they will {clause} there
            i'm driving to {place} to {clause}, where do i turn
        """),
    ),
    Intent(
        label="book_restaurant",
        easy=_lines("""
            book a table at {restaurant}
            reserve a table for {people} at {restaurant}
            find a {cuisine} restaurant for {people}
            make a dinner reservation for {day}
            book a {cuisine} restaurant in {city}
        """),
        medium=_lines("""
            get us a table for {people} {day}
            where can we eat {cuisine} food {day}
            is there anything {cuisine} nearby
            we'd like to dine at {restaurant} at {time}
            dinner for {people} at {restaurant}
        """),
        indirect=_lines("""
            i'm starving and the fridge is empty
            nobody feels like cooking {day}
            i'm craving {cuisine} food
            {person} wants to be taken out to {restaurant}
            we have guests {day} and the oven is broken
        """),
        wrappers=_lines("""
            get us a table at {restaurant}, i refuse to {clause}
            somewhere {cuisine} for {people}, later we will {clause}
            we want to eat at {restaurant} after we {clause}
            dinner for {people} {day}, and we might {clause} there
        """),
    ),
    Intent(
        label="add_to_list",
        easy=_lines("""
            add {item} to my shopping list
            put {item} on the shopping list
            add {item} and {item} to the grocery list
            write {item} on my list
            add {item} to the list
        """),
        medium=_lines("""
            we need more {item}
            i have to buy {item} {day}
            note that we need {item}
            get {item} next time i'm at the shop
            {item} should go on the list
        """),
        indirect=_lines("""
            we're out of {item}
            the last of the {item} is gone
            somebody finished the {item}
            there's no {item} left in the {room}
            {person} used up all the {item}
        """),
        wrappers=_lines("""
            add {clause} to my list
            put {clause} down on the to do list
            we need {item} to {clause}
            i have to buy {item} before i {clause}
        """),
    ),
    Intent(
        label="tell_joke",
        easy=_lines("""
            tell me a joke
            tell me a joke about {topic}
            tell {person} a funny joke
            say something funny about {topic}
            tell us a funny joke {day}
        """),
        medium=_lines("""
            make me laugh
            do you know any good ones about {topic}
            got any puns about {topic}
            have you heard the one about {topic}
            be funny about {topic}
        """),
        indirect=_lines("""
            cheer me up a bit {day}
            i could do with a giggle about {topic}
            {person} looks sad, amuse us
            entertain me until {time}
            i've had an awful day, lighten the mood
        """),
        wrappers=_lines("""
            the one about {topic} who {clause}, how does it go
            make me laugh before i {clause}
            cheer up {person} who has to {clause}
            got any puns about people who {clause}
        """),
    ),
    Intent(
        label="cancel",
        easy=_lines("""
            cancel the {thing}
            stop the {thing}
            cancel my {meeting}
            cancel everything for {day}
            delete the {thing}
        """),
        medium=_lines("""
            never mind about the {thing}
            forget the {thing}
            no more {thing} please
            i don't need the {thing} any more
            that's enough {thing}
        """),
        indirect=_lines("""
            i've changed my mind about the {thing}
            the {thing} is no longer needed {day}
            leave it, i'll deal with the {thing} myself
            {person} can't make it to the {meeting}
            the {meeting} is not happening {day} after all
        """),
        wrappers=_lines("""
            {clause}, oh never mind
            {clause}, no forget it
            don't {clause}
            i no longer want you to {clause}
            there is no need to {clause} any more
            you should not {clause} after all
        """),
    ),
)

CORRECTIONS = _lines("""
    {x} no wait {y}
    {x}, actually no, {y}
    {x}, sorry, i meant {y}
    {x}, scratch that, {y}
    don't {x}, {y}
    no need to {x}, {y}
    i was going to say {x} but {y}
    rather than {x}, {y}
    i didn't ask you to {x}, i asked you to {y}
    {y} but don't {x}
    {y} and don't {x}
    {y} rather than {x}
    {y}, i only said {x} by mistake
    i asked you to {y}, i didn't ask you to {x}
""")

SHARED = (
    Shared("turn it off in the {room}", ("lights_off", "cancel")),
    Shared("turn it up in the {room}", ("set_temperature", "play_music")),
    Shared("put on the {room}", ("lights_on", "play_music")),
    Shared("what's on {day} in {city}", ("check_calendar", "get_weather")),
    Shared("what's happening {day} with {person}", ("check_calendar", "send_message")),
    Shared("set it for {time} {day}", ("set_alarm", "set_reminder")),
    Shared("set it to {duration}", ("set_timer", "set_alarm")),
    Shared("add {item} for {day}", ("add_to_list", "set_reminder")),
    Shared("something with {person} at {restaurant} {day}", ("book_restaurant", "create_event")),
    Shared("find {restaurant} in {city}", ("get_directions", "book_restaurant")),
    Shared("give me something about {topic} {day}", ("tell_joke", "play_music")),
    Shared("call off the {room} one", ("cancel", "lights_off")),
    Shared("tell me about {day} in {city}", ("get_weather", "check_calendar")),
    Shared("add {person} for {day} at {time}", ("create_event", "send_message")),
    Shared("make the {room} nicer for {person}", ("set_temperature", "lights_on")),
    Shared("where is {person} at {time} {day}", ("get_directions", "check_calendar")),
    Shared("say something to {person} about {topic}", ("tell_joke", "send_message")),
    Shared("let me know in {duration} about the {thing}", ("set_reminder", "set_timer")),
)

JOINERS = _lines("""
    {x} and {y}
    {x} and then {y}
    {x}, then {y}
    {x} and also {y}
    {x}, and while you are at it {y}
    {x}, oh and {y}
    {x} plus {y}
    after that {y}, but first {x}
    {x}, as well as that {y}
    before you {y} please {x}
    first {x}, {y} next
    once that's done {y}, start by making sure you {x}
""")

# The request {x} is withdrawn; what was asked for besides it still stands.
WITHDRAWALS = _lines("""
    {y}, but don't {x}
    don't {x}, just {y}
    {y} and {x}, no, drop the last one
    {x} and {y}, no, drop the first one
    {y}, {x}, well, everything but the last part
    {x}, {y}, well, everything but the first part
    {y}, i'll {x} myself
    i'll {x} myself, {y}
    {x} no wait {y}
    no need to {x}, {y}
    {y}, there is no need to {x}
""")

POLITE_OPENERS = _lines("""
    please
    could you
    can you please
    would you
    i'd like you to
    would you mind, just
    i want you to
    go ahead and
    do me a favour and
    you need to
    i was wondering if you could
    be so kind and
    let's
    can we
""")

FILLER_OPENERS = _lines("""
    um
    hey
    so
    ok
    okay now
    hi there
    well
    right
    hello
    listen
    hmm
    oh
    ok assistant
    hey assistant
    excuse me
    good morning
    yeah
    uh
""")

CLOSERS = _lines("""
    please
    thanks
    if you can
    thank you
    right now
    for me
    when you get a chance
    will you
    quickly
    if that's ok
    as usual
    if possible
    would you
    or so
    cheers
""")
