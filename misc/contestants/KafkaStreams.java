import com.fasterxml.jackson.databind.ObjectMapper;
import com.maxmind.db.Reader;
import java.io.File;
import java.net.InetAddress;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;

/** The same work with Kafka Streams, on THREADS threads with GUARANTEE. It follows the topic until it is killed. */
public class KafkaStreams {
    private static final ObjectMapper JSON = new ObjectMapper();

    /** The least recently used answers go first; each thread remembers as many as a process of kafka_enrich.py. */
    private static final ThreadLocal<Map<String, byte[]>> CACHE = ThreadLocal.withInitial(
        () -> new LinkedHashMap<String, byte[]>(16, 0.75f, true) {
            @Override
            protected boolean removeEldestEntry(Map.Entry<String, byte[]> eldest) {
                return size() > 100_000;
            }
        });

    private static Reader reader;

    public static void main(String[] arguments) throws Exception {
        reader = new Reader(new File(System.getenv("GEOIP_DATABASE")), Reader.FileMode.MEMORY_MAPPED);
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, System.getenv("KAFKA_GROUP_ID"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, System.getenv("KAFKA_BROKERS"));
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, System.getenv("THREADS"));
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, System.getenv("GUARANTEE"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, System.getenv("STATE_DIR"));
        settings.put(StreamsConfig.DEFAULT_KEY_SERDE_CLASS_CONFIG, Serdes.ByteArraySerde.class);
        settings.put(StreamsConfig.DEFAULT_VALUE_SERDE_CLASS_CONFIG, Serdes.ByteArraySerde.class);
        settings.put(StreamsConfig.consumerPrefix("auto.offset.reset"), "earliest");
        StreamsBuilder builder = new StreamsBuilder();
        builder.<byte[], byte[]>stream(System.getenv("KAFKA_INPUT_TOPIC"))
            .mapValues(KafkaStreams::enrich)
            .to(System.getenv("KAFKA_OUTPUT_TOPIC"));
        new org.apache.kafka.streams.KafkaStreams(builder.build(), settings).start();
    }

    private static byte[] enrich(byte[] value) {
        return CACHE.get().computeIfAbsent(new String(value, StandardCharsets.UTF_8).strip(), KafkaStreams::locate);
    }

    private static byte[] locate(String ip) {
        try {
            InetAddress address = InetAddress.getByName(ip);
            if (address.isSiteLocalAddress() || address.isLoopbackAddress() || address.isLinkLocalAddress()) {
                throw new IllegalArgumentException(ip);
            }
            Map<?, ?> found = reader.get(address, Map.class);
            found = found == null ? Map.of() : found;
            Object region = found.get("subdivisions") instanceof List<?> all && !all.isEmpty() ? all.get(0) : found.get("state1");
            Object country = found.get("country") == null ? found.get("country_code") : found.get("country");
            Map<String, Object> record = new LinkedHashMap<>();
            record.put("ip", ip);
            record.put("city", name(found.get("city")));
            record.put("region", name(region));
            record.put("country_name", name(country));
            if (record.get("city") == null && record.get("region") == null && record.get("country_name") == null) {
                record.put("error", "not_found");
            }
            return JSON.writeValueAsBytes(record);
        } catch (Exception error) {
            throw new RuntimeException(error);
        }
    }

    private static Object name(Object field) {
        Object name = field instanceof Map<?, ?> nested ? ((Map<?, ?>) nested.get("names")).get("en") : field;
        return "".equals(name) ? null : name;
    }
}
